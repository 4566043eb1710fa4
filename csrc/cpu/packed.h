// Reads the packed format: words of the mask, offsets, and the values of a row. The
// mask and the offsets are untrusted. Included by files that are compiled for different
// CPUs, hence the anonymous namespace (see generic.h).

#ifndef HALVE_PACKED_H
#define HALVE_PACKED_H

#include <cstdint>
#include <cstring>

#include "halve.h"

namespace {

constexpr int64_t word_columns = 64;

inline int64_t words_of(int64_t columns) {
  return columns / word_columns + (columns % word_columns != 0);
}

// Data from a file may be unaligned for its type.
template <class T>
inline T read(const void* from, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const unsigned char*>(from) + index * sizeof(T),
              sizeof(T));
  return value;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline const unsigned char* mask_of(const halve_packed& w, int64_t row) {
  return static_cast<const unsigned char*>(w.mask) +
         row * words_of(w.columns) * int64_t{sizeof(uint64_t)};
}

// Returns the index of a row's first value; an offset past the last value is clamped.
inline int64_t begin_of(const halve_packed& w, int64_t row) {
  const uint64_t begin =
      w.wide_offsets ? read<uint64_t>(w.offsets, row) : read<uint32_t>(w.offsets, row);
  return begin < static_cast<uint64_t>(w.kept) ? static_cast<int64_t>(begin) : w.kept;
}

// Returns a pointer to a row's values from which 64 values for each word of the mask
// can be read, whatever the mask says, so that the hot loops need no bounds checks.
// Most rows begin that far from the end of the array. For the few that do not, the
// values up to the end are copied to `spare` and padded with zeros.
template <class T>
inline const T* values_of(const halve_packed& w, int64_t row, T* spare) {
  const int64_t begin = begin_of(w, row);
  const int64_t readable = word_columns * words_of(w.columns);
  const T* values = static_cast<const T*>(w.values) + begin;
  if (w.kept - begin >= readable) return values;
  const int64_t left = w.kept - begin;
  if (left > 0) std::memcpy(spare, values, left * sizeof(T));
  std::memset(spare + left, 0, (readable - left) * sizeof(T));
  return spare;
}

}  // namespace

#endif
