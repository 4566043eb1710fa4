// The reference of attention, which defines the result: sums in double, one rounding at
// the end, portable C++ without optimizations.

#include <cmath>

#include "kernel.h"
#include "packed.h"
#include "elementwise.h"
#include "reference_dtypes.h"

namespace halve {
namespace {

template <class Dtype>
double number_at(const void* from, int64_t index) {
  return Dtype::decode(read<typename Dtype::Stored>(from, index));
}

template <class Dtype>
double score(const halve_attention& a, int64_t query, int64_t key) {
  double sum = 0;
  for (int64_t i = 0; i < a.width; ++i) {
    sum += number_at<Dtype>(a.query, query + i) * number_at<Dtype>(a.keys, key + i);
  }
  return sum * a.scale;
}

// Turns scores into weights whose sum is one.
void normalize(double* scores, int64_t length) {
  double top = scores[0], sum = 0;
  for (int64_t t = 0; t < length; ++t) top = std::fmax(top, scores[t]);
  for (int64_t t = 0; t < length; ++t) sum += scores[t] = std::exp(scores[t] - top);
  for (int64_t t = 0; t < length; ++t) scores[t] /= sum;
}

template <class Dtype>
void attend(const halve_attention& a, void* out, Range heads, void* workspace) {
  using Stored = typename Dtype::Stored;
  auto* scores = static_cast<double*>(workspace);
  for (int64_t index = heads.first; index < heads.last; ++index) {
    const int64_t sequence = index / a.heads;
    const int64_t head = index % a.heads / (a.heads / a.key_heads);
    const int64_t key = sequence * a.key_strides[0] + head * a.key_strides[1];
    const int64_t value = sequence * a.value_strides[0] + head * a.value_strides[1];
    for (int64_t t = 0; t < a.length; ++t) {
      scores[t] = score<Dtype>(a, index * a.width, key + t * a.key_strides[2]);
    }
    normalize(scores, a.length);
    for (int64_t i = 0; i < a.width; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < a.length; ++t) {
        const int64_t at = value + t * a.value_strides[2] + i;
        sum += scores[t] * number_at<Dtype>(a.values, at);
      }
      const Stored rounded = Dtype::encode(sum);
      std::memcpy(static_cast<Stored*>(out) + index * a.width + i, &rounded,
                  sizeof(rounded));
    }
  }
}

}  // namespace

// Elementwise operations have one definition for all kernels.
template <class Dtype>
struct Scalar {
  using Stored = typename Dtype::Stored;
  static float to_float(Stored value) { return static_cast<float>(Dtype::decode(value)); }
  static Stored from_float(float value) { return Dtype::encode(value); }
};

template <class Dtype>
constexpr StepKernel step_of = {attend<Dtype>, norm<Scalar<Dtype>>,
                                rotate<Scalar<Dtype>>, gate<Scalar<Dtype>>,
                                add<Scalar<Dtype>>};

const StepKernel reference_step[dtype_count] = {step_of<Float32>, step_of<Float16>,
                                                step_of<Bfloat16>};

}  // namespace halve
