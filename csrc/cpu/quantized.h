// Matrices of integer codes, and activations as integers: what the kernels of every
// instruction set share. Mask, offsets, scales, zeros and codes are untrusted. In an
// anonymous namespace for the reason given in generic.h.
//
// A weight is (code - zero) * scale. An activation is q * (scale of its unit): q is an
// integer of 16 or 8 bits, and a unit is a run of columns within a group of the
// weights. A product is then
//
//   y = sum over units of  scale * scale of x * sum of (code - zero) * q
//
// where the inner sum is exact, in integers of 32 bits.

#ifndef HALVE_QUANTIZED_H
#define HALVE_QUANTIZED_H

#include "bfloat16.h"
#include "kernel.h"
#include "packed.h"

namespace {

using halve::Operands;
using halve::Precision;
using halve::Range;

inline int64_t ceil_divide(int64_t n, int64_t by) { return n / by + (n % by != 0); }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_divide(n, to) * to; }

// ---- Groups and units ----

// No more columns share a scale of x. With 128 columns of 16-bit activations and 8-bit
// codes, a sum of products is below 128 * 255 * 32639 < 2^31.
constexpr int64_t widest_unit = 128;
constexpr int64_t narrowest_unit = 32;

// A group at least as wide as a row is the row: kernels see a multiple of the unit.
inline int64_t group_of(const halve_quantized& w) {
  if (w.group < w.columns) return w.group;
  return round_up(w.columns > 0 ? w.columns : 1, widest_unit);
}

inline int64_t groups_of(const halve_quantized& w) {
  return ceil_divide(w.columns, group_of(w));
}

// The columns of a unit: the largest of 128, 64 and 32 that divides a group.
inline int64_t unit_of(const halve_quantized& w) {
  int64_t unit = widest_unit;
  while (unit > narrowest_unit && group_of(w) % unit != 0) unit /= 2;
  return unit;
}

// ---- Codes ----

// The bytes of `count` codes; written so that it cannot overflow.
inline int64_t code_bytes_of(int64_t count, int64_t bits) {
  return count / 8 * bits + ceil_divide(count % 8 * bits, 8);
}

inline int32_t code_at(const uint8_t* codes, int64_t index, int32_t bits) {
  const uint8_t* first = codes + index / 8 * bits + index % 8 * bits / 8;
  const int32_t shift = index % 8 * bits % 8;
  const int32_t next = shift + bits > 8 ? first[1] << 8 : 0;
  return ((first[0] | next) >> shift) & ((1 << bits) - 1);
}

// The byte where a row begins; an offset past the last byte is clamped.
inline int64_t first_byte_of(const halve_quantized& w, int64_t row) {
  if (w.mask == nullptr) return row * code_bytes_of(w.columns, w.bits);
  const uint64_t begin =
      w.wide_offsets ? read<uint64_t>(w.offsets, row) : read<uint32_t>(w.offsets, row);
  const auto end = static_cast<uint64_t>(w.code_bytes);
  return static_cast<int64_t>(begin < end ? begin : end);
}

// Bytes from a row's first code that a kernel may read. A word of 64 columns takes
// 8 * bits bytes at most, whatever the mask says, and a load is a line wide.
inline int64_t readable_bytes(const halve_quantized& w) {
  return words_of(w.columns) * 8 * w.bits + 64;
}

// Returns a pointer to a row's codes from which readable_bytes can be read, so that the
// loops need no bounds checks. Most rows begin that far from the end of the array. For
// the few that do not, the codes up to the end are copied to `spare` and padded with
// zeros: a code past the end is 0.
inline const uint8_t* codes_of(const halve_quantized& w, int64_t row, uint8_t* spare) {
  const int64_t begin = first_byte_of(w, row), readable = readable_bytes(w);
  const int64_t left = w.code_bytes - begin;
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + begin;
  if (left >= readable) return codes;
  if (left > 0) std::memcpy(spare, codes, left);
  std::memset(spare + left, 0, readable - left);
  return spare;
}

inline const uint8_t* mask_of(const halve_quantized& w, int64_t row) {
  return static_cast<const uint8_t*>(w.mask) + row * words_of(w.columns) * 8;
}

// ---- Scales and zeros ----

inline uint16_t scale_at(const halve_quantized& w, int64_t row, int64_t group) {
  return read<uint16_t>(w.scales, row * groups_of(w) + group);
}

inline int64_t zero_bytes_of(const halve_quantized& w) {
  return code_bytes_of(groups_of(w), w.bits);
}

inline const uint8_t* zeros_of(const halve_quantized& w, int64_t row) {
  return static_cast<const uint8_t*>(w.zeros) + row * zero_bytes_of(w);
}

// The middle of the codes, rounded up where it lies between two of them.
inline int32_t middle_of(const halve_quantized& w) { return 1 << (w.bits - 1); }

// The code of zero, which is half an integer where `midrise` is 1.
inline float zero_at(const halve_quantized& w, int64_t row, int64_t group) {
  if (w.zeros != nullptr) return float(code_at(zeros_of(w, row), group, w.bits));
  return float(middle_of(w)) - (w.midrise ? 0.5f : 0.0f);
}

// What is subtracted from the codes of a group in sums of integers. Where zero lies
// between two codes it is the code above: half a step for each activation is then added
// as float32, which loses nothing to cancellation, because every weight is at least
// half a step. With a mask that does not hold, since weights without a code are 0.
// There, codes count double, and so does zero.
inline bool doubles_codes(const halve_quantized& w) {
  return w.midrise && w.mask != nullptr;
}

inline bool adds_half_steps(const halve_quantized& w) {
  return w.midrise && w.mask == nullptr;
}

inline int32_t integer_zero(const halve_quantized& w, int64_t row, int64_t group) {
  if (w.zeros != nullptr) return code_at(zeros_of(w, row), group, w.bits);
  return doubles_codes(w) ? 2 * middle_of(w) - 1 : middle_of(w);
}

// ---- Numbers of a dtype ----
// `Half` converts single float16 numbers.

template <class Half>
inline float number_at(const void* from, int32_t dtype, int64_t index) {
  if (dtype == HALVE_F32) return read<float>(from, index);
  const uint16_t bits = read<uint16_t>(from, index);
  return dtype == HALVE_F16 ? Half::to_float(bits) : bfloat16_to_float(bits);
}

template <class Half>
inline void put_number(void* to, int32_t dtype, int64_t index, float value) {
  if (dtype == HALVE_F32) {
    std::memcpy(static_cast<float*>(to) + index, &value, sizeof(value));
    return;
  }
  const uint16_t bits =
      dtype == HALVE_F16 ? Half::from_float(value) : bfloat16_from_float(value);
  std::memcpy(static_cast<uint16_t*>(to) + index, &bits, sizeof(bits));
}

// Writes the result of one row for vector b.
template <class Half>
inline void put_result(const Operands& o, int32_t dtype, int64_t rows, int64_t b,
                       int64_t row, float sum) {
  const float bias = o.bias ? number_at<Half>(o.bias, dtype, row) : 0.0f;
  put_number<Half>(o.y, dtype, b * rows + row, sum + bias);
}

// ---- Activations as integers ----

// Sizes of the integers: 127 and 127 * 256 + 127. The latter splits into two digits of
// 8 bits, both signed: q = 256 * high + low.
inline float largest_integer(int32_t activations) {
  return activations == HALVE_INT8 ? 127.0f : 32639.0f;
}

// A unit without a larger number is zero: its scale would be subnormal, or its inverse
// infinite.
constexpr float smallest_activation = 1e-33f;
constexpr float largest_float = 3.40282347e38f;

// Turns a unit of x into integers, rounded to nearest, ties to even, and returns its
// scale. There are no integers for infinities and NaNs: then the scale is NaN, and so
// is every result. Every kernel computes these integers, to the bit.
inline float quantize(const float* x, int64_t count, float limit, int16_t* integers) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float size = __builtin_fabsf(x[i]);
    finite &= size <= largest_float;
    largest = size > largest ? size : largest;
  }
  if (!finite || largest < smallest_activation) {
    std::memset(integers, 0, count * sizeof(*integers));
    return finite ? 0.0f : __builtin_nanf("");
  }
  const float inverse = limit / largest;
  for (int64_t i = 0; i < count; ++i) {
    integers[i] = static_cast<int16_t>(__builtin_nearbyintf(x[i] * inverse));
  }
  return largest / limit;
}

}  // namespace

#endif
