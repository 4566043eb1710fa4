// Kernels for CPUs with AVX-512 F, BW, VL and DQ: weights are converted to float32,
// then expanded sixteen at a time by vexpandps.

#include <immintrin.h>

#include "bfloat16.h"
#include "generic.h"
#include "in_register.h"
#include "step.h"
#include "sum_eight.h"

namespace {

// Zero-extends the bits of sixteen weights to 32 bits each, without converting them.
inline __m512i widen_bits(const uint32_t* from) { return _mm512_loadu_si512(from); }

inline __m512i widen_bits(const uint16_t* from) {
  return _mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline void store_bits(uint32_t* to, __m512i bits) { _mm512_storeu_si512(to, bits); }

inline void store_bits(uint16_t* to, __m512i bits) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bits));
}

struct Float32 {
  using Stored = uint32_t;
  static __m512 widen(const Stored* from) { return _mm512_loadu_ps(from); }
  static float to_float(Stored value) { return float_from_bits(value); }
  static Stored from_float(float value) { return bits_of(value); }
};

struct Float16 {
  using Stored = uint16_t;
  static __m512 widen(const Stored* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static float to_float(Stored value) { return _cvtsh_ss(value); }
  static Stored from_float(float value) {
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static __m512 widen(const Stored* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(widen_bits(from), 16));
  }
  static float to_float(Stored value) { return bfloat16_to_float(value); }
  static Stored from_float(float value) { return bfloat16_from_float(value); }
};

template <class Dtype>
struct Lanes : Dtype {
  using Stored = typename Dtype::Stored;
  using Element = float;
  using Vector = __m512;
  using Sum = __m512;
  static constexpr int64_t width = 16;
  static constexpr int64_t few = 3;
  static constexpr int64_t batch_tile = 6;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }
  static Vector load(const Element* from) { return _mm512_load_ps(from); }
  static void store(Element* to, Vector v) { _mm512_store_ps(to, v); }
  static Sum dot(Sum sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

  static void totals(const Sum* sums, float* out) {
    _mm256_storeu_ps(out, sum_eight(sums));
  }

  static Vector expand(const Stored* from, uint64_t bits) {
    const Vector zeros = in_register(_mm512_setzero_ps());
    const Vector packed = in_register(Dtype::widen(from));
    return _mm512_mask_expand_ps(zeros, static_cast<__mmask16>(bits), packed);
  }

  // Moves bits and never converts to float32, which would quiet a signalling NaN.
  static void copy(Stored* to, const Stored* from, uint64_t bits) {
    const __m512i zeros = in_register(_mm512_setzero_si512());
    const __m512i packed = in_register(widen_bits(from));
    const auto mask = static_cast<__mmask16>(bits);
    store_bits(to, _mm512_mask_expand_epi32(zeros, mask, packed));
  }
};

}  // namespace

const halve::Kernel halve::avx512f_kernels[dtype_count] = {
    kernel_of<Lanes<Float32>>, kernel_of<Lanes<Float16>>, kernel_of<Lanes<Bfloat16>>};

const halve::StepKernel halve::avx512f_step[dtype_count] = {
    step_of<Lanes<Float32>>, step_of<Lanes<Float16>>, step_of<Lanes<Bfloat16>>};
