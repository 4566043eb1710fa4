// Conversions between the dtypes and double, from the definitions of the formats: for
// the reference kernels, which have no instructions for them.

#ifndef HALVE_REFERENCE_DTYPES_H
#define HALVE_REFERENCE_DTYPES_H

#include <cmath>

#include "bfloat16.h"

namespace {

// Rounds to the nearest number, ties to even, that has `fraction` bits after the
// leading one and no exponent below `min_exponent`. Does not handle overflow.
inline double nearest(double value, int fraction, int min_exponent) {
  if (!std::isfinite(value) || value == 0) return value;
  const int exponent =
      std::ilogb(value) < min_exponent ? min_exponent : std::ilogb(value);
  return std::ldexp(std::nearbyint(std::ldexp(value, fraction - exponent)),
                    exponent - fraction);
}

struct Float32 {
  using Stored = uint32_t;
  static double decode(Stored value) { return float_from_bits(value); }
  static Stored encode(double value) { return bits_of(static_cast<float>(value)); }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static double decode(Stored value) { return bfloat16_to_float(value); }
  static Stored encode(double value) {
    return bfloat16_from_float(static_cast<float>(nearest(value, 7, -126)));
  }
};

struct Float16 {
  using Stored = uint16_t;

  static double decode(Stored value) {
    const double sign = value & 0x8000 ? -1 : 1;
    const int exponent = (value >> 10) & 31, fraction = value & 1023;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, -24);
    return sign * std::ldexp(1024 + fraction, exponent - 25);
  }

  static Stored encode(double value) {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    return static_cast<Stored>(sign | encode_size(std::fabs(nearest(value, 10, -14))));
  }

  // Exact, because `size` is a float16 number already, or above the largest one.
  static int encode_size(double size) {
    if (std::isnan(size)) return 0x7e00;
    if (size > 65504) return 0x7c00;
    if (size < std::ldexp(1, -14)) return static_cast<int>(std::ldexp(size, 24));
    const int exponent = std::ilogb(size);
    const int fraction = static_cast<int>(std::ldexp(size, 10 - exponent)) - 1024;
    return ((exponent + 15) << 10) | fraction;
  }
};

}  // namespace

#endif
