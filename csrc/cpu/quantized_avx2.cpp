// Products with integer codes for CPUs with AVX2. Nothing here needs pdep, which is
// slow on some of them.

#include <immintrin.h>

#include "quantized_bytes.h"

namespace {

inline __m128i load_sixteen(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

inline __m128i load_eight(const void* from) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(from));
}

// How four codes of a few bits get into each lane of 32 bits: the two bytes that hold
// them, and the bit at which they begin.
struct LaneTable {
  alignas(32) uint8_t bytes[32];
  alignas(32) uint32_t first_bit[8];
};

constexpr LaneTable make_lane_table(int bits) {
  LaneTable table{};
  for (int lane = 0; lane < 8; ++lane) {
    const int bit = lane * 4 * bits;
    for (int i = 0; i < 4; ++i) {
      table.bytes[4 * lane + i] = static_cast<uint8_t>(i < 2 ? bit / 8 + i : 0x80);
    }
    table.first_bit[lane] = static_cast<uint32_t>(bit % 8);
  }
  return table;
}

template <int bits>
constexpr LaneTable lane_table = make_lane_table(bits);

struct Lanes {
  using Integers = __m256i;
  using Steps = __m256i;
  using Floats = __m256;

  struct Half {
    static float to_float(uint16_t bits) { return _cvtsh_ss(bits); }
    static uint16_t from_float(float value) {
      return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    }
  };

  // Four codes in a lane move apart in two steps: the upper two by 16 bits less their
  // own, then the upper one of each two by 8 bits less its own.
  template <int bits>
  static void unpack(const uint8_t* codes, uint8_t* out) {
    if constexpr (bits == 8) {
      std::memcpy(out, codes, 32);
    } else {
      const LaneTable& table = lane_table<bits>;
      const auto* bytes = reinterpret_cast<const __m256i*>(table.bytes);
      const auto* first = reinterpret_cast<const __m256i*>(table.first_bit);
      const __m256i both = _mm256_broadcastsi128_si256(load_sixteen(codes));
      __m256i v = _mm256_shuffle_epi8(both, _mm256_load_si256(bytes));
      v = _mm256_srlv_epi32(v, _mm256_load_si256(first));
      v = _mm256_or_si256(v, _mm256_slli_epi32(v, 16 - 2 * bits));
      v = _mm256_and_si256(v, _mm256_set1_epi16((1 << (2 * bits)) - 1));
      v = _mm256_or_si256(v, _mm256_slli_epi16(v, 8 - bits));
      v = _mm256_and_si256(v, _mm256_set1_epi8((1 << bits) - 1));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v);
    }
  }

  static void double_codes(uint8_t* bytes) {
    auto* at = reinterpret_cast<__m256i*>(bytes);
    const __m256i v = _mm256_loadu_si256(at);
    _mm256_storeu_si256(at, _mm256_add_epi8(v, v));
  }

  static void spread(uint8_t* out, const uint8_t* bytes, const uint8_t* order,
                     uint8_t zero) {
    const __m128i zeros = _mm_set1_epi8(static_cast<char>(zero));
    const __m128i both = _mm_unpacklo_epi64(load_eight(bytes), zeros);
    const __m128i spread = _mm_shuffle_epi8(both, load_eight(order));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), spread);
  }

  static Integers no_integers() { return _mm256_setzero_si256(); }

  static Steps steps(const uint8_t* bytes, int32_t zero) {
    const __m256i codes = _mm256_cvtepu8_epi16(load_sixteen(bytes));
    return _mm256_sub_epi16(codes, _mm256_set1_epi16(static_cast<int16_t>(zero)));
  }

  static Integers dot(Integers sum, Steps steps, const int16_t* q) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(steps, x));
  }

  static Floats no_floats() { return _mm256_setzero_ps(); }

  static Floats scaled(Floats sum, Integers integers, float scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(integers), _mm256_set1_ps(scale), sum);
  }

  static float total(Floats sum) {
    __m128 part =
        _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    part = _mm_add_ps(part, _mm_movehl_ps(part, part));
    return _mm_cvtss_f32(_mm_add_ss(part, _mm_movehdup_ps(part)));
  }

  // The code of zero is 0, never -0, whatever the scale is.
  static __m256 weights(const uint8_t* bytes, int32_t zero, float scale) {
    const __m256i codes = _mm256_cvtepu8_epi32(load_eight(bytes));
    const __m256i steps = _mm256_sub_epi32(codes, _mm256_set1_epi32(zero));
    const __m256i is_zero = _mm256_cmpeq_epi32(steps, _mm256_setzero_si256());
    const __m256 product =
        _mm256_mul_ps(_mm256_cvtepi32_ps(steps), _mm256_set1_ps(scale));
    return _mm256_andnot_ps(_mm256_castsi256_ps(is_zero), product);
  }

  // Rounds to nearest, ties to even, as bfloat16_from_float; a NaN is made quiet.
  static __m128i to_bfloat16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i up =
        _mm256_add_epi32(_mm256_and_si256(high, one), _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(rounded, quiet, is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide),
                            _mm256_extracti128_si256(wide, 1));
  }

  template <int32_t dtype>
  static void put(void* out, const uint8_t* bytes, int32_t zero, float scale) {
    const __m256 v = weights(bytes, zero, scale);
    if constexpr (dtype == HALVE_F32) {
      _mm256_storeu_ps(static_cast<float*>(out), v);
    } else {
      const __m128i narrow = dtype == HALVE_F16
                                 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)
                                 : to_bfloat16(v);
      _mm_storeu_si128(static_cast<__m128i*>(out), narrow);
    }
  }
};

}  // namespace

const halve::QuantizedKernel halve::avx2_quantized_kernel = quantized_kernel_of<Lanes>;
