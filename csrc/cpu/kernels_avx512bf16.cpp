// The bfloat16 kernel for CPUs with AVX-512 BF16 and VBMI2: one vpexpandw expands 32
// weights and one vdpbf16ps multiplies them, without converting them to float32.
// vdpbf16ps treats subnormal numbers (below 1e-38) as zeros.

#include <immintrin.h>

#include "bfloat16.h"
#include "generic.h"
#include "in_register.h"
#include "sum_eight.h"

namespace {

struct Bfloat16Lanes {
  using Stored = uint16_t;
  using Element = uint16_t;
  using Vector = __m512i;
  using Sum = __m512;
  static constexpr int64_t width = 32;
  static constexpr int64_t few = 5;
  static constexpr int64_t batch_tile = 6;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Vector load(const Element* from) { return _mm512_load_si512(from); }
  static void store(Element* to, Vector v) { _mm512_store_si512(to, v); }
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

  static void totals(const Sum* sums, float* out) {
    _mm256_storeu_ps(out, sum_eight(sums));
  }

  static Sum dot(Sum sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a),
                            reinterpret_cast<__m512bh>(b));
  }

  static Vector widen(const Stored* from) { return _mm512_loadu_si512(from); }

  static Vector expand(const Stored* from, uint64_t bits) {
    const Vector zeros = in_register(_mm512_setzero_si512());
    const Vector packed = in_register(widen(from));
    return _mm512_mask_expand_epi16(zeros, static_cast<__mmask32>(bits), packed);
  }

  static void copy(Stored* to, const Stored* from, uint64_t bits) {
    _mm512_storeu_si512(to, expand(from, bits));
  }

  static float to_float(Stored value) { return bfloat16_to_float(value); }
  static Stored from_float(float value) { return bfloat16_from_float(value); }
};

}  // namespace

const halve::Kernel halve::avx512bf16_bf16_kernel = kernel_of<Bfloat16Lanes>;
