// The elementwise operations of a decode step, as templates over a dtype `D` with
//   Stored, to_float(stored), from_float(float)
// as in generic.h. They are loops without intrinsics, from which the compiler makes
// vectors of the instruction set that a file is compiled for.
//
// Every intermediate result that the models' code in Python holds in the dtype is
// rounded to it here, so the results are the same but for the order of a sum and the
// last bits of an exponential.

#ifndef HALVE_ELEMENTWISE_H
#define HALVE_ELEMENTWISE_H

#include <cmath>

#include "bfloat16.h"
#include "kernel.h"

namespace {

// Parts of a sum that are added up beside each other.
constexpr int64_t sum_parts = 16;

// e^x for x <= 88, to a few units in the last place; the compiler makes vectors of it.
// With n the integer nearest to x / ln 2, e^x = 2^n e^r with |r| <= ln 2 / 2.
inline float exp_of(float x) {
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -87.0f ? -87.0f : x;          // below, 2^n would not be a normal number
  x = x > 88.0f ? 88.0f : x;            // above, it would be infinite
  const float shifted = x * 1.44269504f + round;
  const float n = shifted - round;
  // ln 2 in two parts, the first of which has few digits, so that n * it is exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t power = (bits_of(shifted) + 127 - bits_of(round)) << 23;
  return p * float_from_bits(power);
}

template <class D>
inline float rounded(float value) {
  return D::to_float(D::from_float(value));
}

template <class D>
float mean_of_squares(const typename D::Stored* x, int64_t count) {
  float parts[sum_parts] = {};
  int64_t i = 0;
  for (; i + sum_parts <= count; i += sum_parts) {
    for (int64_t k = 0; k < sum_parts; ++k) {
      const float value = D::to_float(x[i + k]);
      parts[k] += value * value;
    }
  }
  float sum = 0;
  for (; i < count; ++i) sum += D::to_float(x[i]) * D::to_float(x[i]);
  for (const float part : parts) sum += part;
  return sum / count;
}

template <class D>
void norm(const halve_operation& o) {
  const auto* weight = static_cast<const typename D::Stored*>(o.other);
  for (int64_t row = 0; row < o.rows; ++row) {
    const auto* x = static_cast<const typename D::Stored*>(o.x) + row * o.columns;
    auto* y = static_cast<typename D::Stored*>(o.y) + row * o.columns;
    const float mean = mean_of_squares<D>(x, o.columns);
    const float factor = 1.0f / std::sqrt(mean + o.epsilon);
    for (int64_t i = 0; i < o.columns; ++i) {
      const float normal = rounded<D>(D::to_float(x[i]) * factor);
      y[i] = D::from_float(D::to_float(weight[i]) * normal);
    }
  }
}

template <class D>
void rotate(const halve_operation& o, const void* table) {
  const auto* cosines = static_cast<const typename D::Stored*>(table);
  const auto* sines = cosines + o.columns;
  const int64_t half = o.columns / 2;
  for (int64_t row = 0; row < o.rows; ++row) {
    const auto* x = static_cast<const typename D::Stored*>(o.x) + row * o.columns;
    auto* y = static_cast<typename D::Stored*>(o.y) + row * o.columns;
    const auto turned = [&](int64_t i, float own, float opposite) {
      return D::from_float(rounded<D>(own * D::to_float(cosines[i])) +
                           rounded<D>(opposite * D::to_float(sines[i])));
    };
    for (int64_t i = 0; i < half; ++i) {
      const float first = D::to_float(x[i]), second = D::to_float(x[i + half]);
      y[i] = turned(i, first, -second);
      y[i + half] = turned(i + half, second, first);
    }
  }
}

template <class D>
void gate(const halve_operation& o) {
  const auto* x = static_cast<const typename D::Stored*>(o.x);
  const auto* other = static_cast<const typename D::Stored*>(o.other);
  auto* y = static_cast<typename D::Stored*>(o.y);
  for (int64_t i = 0; i < o.rows * o.columns; ++i) {
    const float value = D::to_float(x[i]);
    const float silu = rounded<D>(value / (1.0f + exp_of(-value)));
    y[i] = D::from_float(silu * D::to_float(other[i]));
  }
}

template <class D>
void add(const halve_operation& o) {
  const auto* x = static_cast<const typename D::Stored*>(o.x);
  const auto* other = static_cast<const typename D::Stored*>(o.other);
  auto* y = static_cast<typename D::Stored*>(o.y);
  for (int64_t i = 0; i < o.rows * o.columns; ++i) {
    y[i] = D::from_float(D::to_float(x[i]) + D::to_float(other[i]));
  }
}

}  // namespace

#endif
