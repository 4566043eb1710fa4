// Scalar conversions of bfloat16, for biases and results; each instruction set converts
// vectors itself. In an anonymous namespace for the reason given in generic.h.

#ifndef HALVE_BFLOAT16_H
#define HALVE_BFLOAT16_H

#include <cstdint>
#include <cstring>

namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float bfloat16_to_float(uint16_t value) {
  return float_from_bits(uint32_t{value} << 16);
}

// Rounds to nearest, ties to even. A NaN is made quiet first, since the carry of the
// rounding could turn it into an infinity.
inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

#endif
