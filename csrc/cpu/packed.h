// Reading the packed format: words of the mask, offsets, and a row's values. Nothing in
// the mask or in the offsets is trusted. Included by files compiled for different CPUs,
// hence the anonymous namespace (see generic.h).

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

// Nothing in a file need be aligned for its type.
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

// Where a row's values begin; an offset past the last value is taken as the end.
inline int64_t begin_of(const halve_packed& w, int64_t row) {
  const uint64_t begin =
      w.wide_offsets ? read<uint64_t>(w.offsets, row) : read<uint32_t>(w.offsets, row);
  return begin < static_cast<uint64_t>(w.kept) ? static_cast<int64_t>(begin) : w.kept;
}

// A row's values, from which 64 a word may be read whatever the mask says. Most rows
// lie that far from the end of the array; for the few that do not, what is left is
// copied to `spare` and followed by zeros. So the hot loops need no bounds.
template <class T>
inline const T* values_of(const halve_packed& w, int64_t row, T* spare) {
  const int64_t begin = begin_of(w, row);
  const int64_t wanted = word_columns * words_of(w.columns);
  const T* values = static_cast<const T*>(w.values) + begin;
  if (w.kept - begin >= wanted) return values;
  const int64_t left = w.kept - begin;
  if (left > 0) std::memcpy(spare, values, left * sizeof(T));
  std::memset(spare + left, 0, (wanted - left) * sizeof(T));
  return spare;
}

}  // namespace

#endif
