// Kernels for CPUs with AVX2, FMA, F16C and BMI2. AVX2 has no expand instruction: a
// byte of the mask selects a shuffle from a table, which moves eight weights to their
// columns.

#include <immintrin.h>

#include "bfloat16.h"
#include "generic.h"
#include "shuffle_table.h"
#include "step.h"
#include "sum_eight.h"

namespace {

inline __m128i shuffle_of(uint64_t bits) {
  const uint8_t* row = shuffle_table.row[bits & 0xff];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(row));
}

inline __m128i load_eight(const uint16_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

struct Float32 {
  using Stored = uint32_t;

  static __m256 widen(const Stored* from) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  }

  // The table holds indices of pairs of bytes (2 n, 2 n + 1). Half of a pair's first
  // index is n, the index of a float; the high bit of a pair without a weight is
  // shifted to the lane's sign bit, by which blendv selects zero.
  static __m256 expand(const Stored* from, uint64_t bits) {
    const __m256i pairs = _mm256_cvtepu16_epi32(shuffle_of(bits));
    const __m256 spread =
        _mm256_permutevar8x32_ps(widen(from), _mm256_srli_epi32(pairs, 1));
    const __m256 absent = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    return _mm256_blendv_ps(spread, _mm256_setzero_ps(), absent);
  }

  static void copy(Stored* to, const Stored* from, uint64_t bits) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to), expand(from, bits));
  }

  static float to_float(Stored value) { return float_from_bits(value); }
  static Stored from_float(float value) { return bits_of(value); }
};

// Common code of both 16-bit dtypes; Dtype::widen_register converts eight to float32.
template <class Dtype>
struct Sixteen {
  using Stored = uint16_t;

  static __m128i expand_bits(const Stored* from, uint64_t bits) {
    return _mm_shuffle_epi8(load_eight(from), shuffle_of(bits));
  }

  static __m256 widen(const Stored* from) {
    return Dtype::widen_register(load_eight(from));
  }

  static __m256 expand(const Stored* from, uint64_t bits) {
    return Dtype::widen_register(expand_bits(from, bits));
  }

  static void copy(Stored* to, const Stored* from, uint64_t bits) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), expand_bits(from, bits));
  }
};

struct Float16 : Sixteen<Float16> {
  static __m256 widen_register(__m128i v) { return _mm256_cvtph_ps(v); }
  static float to_float(Stored value) { return _cvtsh_ss(value); }
  static Stored from_float(float value) {
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  }
};

struct Bfloat16 : Sixteen<Bfloat16> {
  static __m256 widen_register(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static float to_float(Stored value) { return bfloat16_to_float(value); }
  static Stored from_float(float value) { return bfloat16_from_float(value); }
};

template <class Dtype>
struct Lanes : Dtype {
  using Element = float;
  using Vector = __m256;
  using Sum = __m256;
  static constexpr int64_t width = 8;
  static constexpr int64_t few = 4;
  static constexpr int64_t batch_tile = 2;

  static Sum zero() { return _mm256_setzero_ps(); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }
  static Vector load(const Element* from) { return _mm256_load_ps(from); }
  static void store(Element* to, Vector v) { _mm256_store_ps(to, v); }
  static Sum dot(Sum sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
  static Sum add(Sum a, Sum b) { return _mm256_add_ps(a, b); }

  static float total(Sum sum) {
    __m128 part =
        _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    part = _mm_add_ps(part, _mm_movehl_ps(part, part));
    return _mm_cvtss_f32(_mm_add_ss(part, _mm_movehdup_ps(part)));
  }

  static void totals(const Sum* sums, float* out) {
    __m256 eight[tile_rows];
    for (int64_t r = 0; r < tile_rows; ++r) eight[r] = sums[r];
    _mm256_storeu_ps(out, sum_eight(eight));
  }
};

}  // namespace

const halve::Kernel halve::avx2_kernels[dtype_count] = {
    kernel_of<Lanes<Float32>>, kernel_of<Lanes<Float16>>, kernel_of<Lanes<Bfloat16>>};

const halve::StepKernel halve::avx2_step[dtype_count] = {
    step_of<Lanes<Float32>>, step_of<Lanes<Float16>>, step_of<Lanes<Bfloat16>>};
