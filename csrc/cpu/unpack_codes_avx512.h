// Unpacks rows of codes, for CPUs with AVX-512 VBMI, VBMI2 and BF16.

#ifndef HALVE_UNPACK_CODES_AVX512_H
#define HALVE_UNPACK_CODES_AVX512_H

#include "codes_avx512.h"

namespace {

// ---- The numbers of a dtype ----
// `half_word` columns, which share a group, are converted together.

constexpr int64_t half_word = 32;

// Sixteen weights as float32: exact products. The code of zero is 0, never -0.
inline __m512 weights_of(__m512i codes, __m512 zero, __m512 scale) {
  const __m512 steps = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), zero);
  const __mmask16 not_zero =
      _mm512_test_epi32_mask(_mm512_castps_si512(steps), _mm512_castps_si512(steps));
  return _mm512_maskz_mul_ps(not_zero, steps, scale);
}

struct Float32Numbers {
  using Stored = uint32_t;
  // Of the codes 0 to 15.
  static __m512i table(__m512 weights) { return _mm512_castps_si512(weights); }

  static void look_up(Stored* out, __m256i codes, __mmask32 coded, __m512i table) {
    for (int i = 0; i < 2; ++i, coded >>= 16) {
      const __m512i index = _mm512_cvtepu8_epi32(i ? _mm256_extracti128_si256(codes, 1)
                                                   : _mm256_castsi256_si128(codes));
      const auto part = static_cast<__mmask16>(coded);
      _mm512_storeu_si512(out + 16 * i,
                          _mm512_maskz_permutexvar_epi32(part, index, table));
    }
  }

  static void put(Stored* out, __m512 low, __m512 high, __mmask32 coded) {
    const auto first = static_cast<__mmask16>(coded);
    const auto second = static_cast<__mmask16>(coded >> 16);
    _mm512_storeu_ps(out, _mm512_maskz_mov_ps(first, low));
    _mm512_storeu_ps(out + 16, _mm512_maskz_mov_ps(second, high));
  }
};

// Common code of both 16-bit dtypes; Dtype::narrow rounds sixteen float32.
template <class Dtype>
struct SixteenNumbers {
  using Stored = uint16_t;

  static __m512i table(__m512 weights) {
    return _mm512_castsi256_si512(Dtype::narrow(weights));
  }

  static void look_up(Stored* out, __m256i codes, __mmask32 coded, __m512i table) {
    const __m512i index = _mm512_cvtepu8_epi16(codes);
    _mm512_storeu_si512(out, _mm512_maskz_permutexvar_epi16(coded, index, table));
  }

  static void put(Stored* out, __m512 low, __m512 high, __mmask32 coded) {
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(Dtype::narrow(low)),
                                            Dtype::narrow(high), 1);
    _mm512_storeu_si512(out, _mm512_maskz_mov_epi16(coded, both));
  }
};

struct Float16Numbers : SixteenNumbers<Float16Numbers> {
  static __m256i narrow(__m512 v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

// This conversion flushes subnormal numbers; a product of a float16 scale is never one.
struct Bfloat16Numbers : SixteenNumbers<Bfloat16Numbers> {
  static __m256i narrow(__m512 v) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  }
};

// ---- A word after the other ----

// The weights that codes stand for in one group: a table of all of them for up to 4
// bits, and scale and zero for 8 bits.
template <class Numbers>
class GroupWeights {
 public:
  void open(const halve_quantized& w, int64_t row, int64_t group) {
    scale_ = _mm512_set1_ps(_cvtsh_ss(scale_at(w, row, group)));
    zero_ = _mm512_set1_ps(zero_at(w, row, group));
    if (w.bits == 8) return;
    const __m512i codes =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    table_ = Numbers::table(weights_of(codes, zero_, scale_));
  }

  void put_narrow(typename Numbers::Stored* out, __m256i codes, __mmask32 coded) const {
    Numbers::look_up(out, codes, coded, table_);
  }

  void put_bytes(typename Numbers::Stored* out, __m256i codes, __mmask32 coded) const {
    const __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
    const __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1));
    Numbers::put(out, weights_of(low, zero_, scale_), weights_of(high, zero_, scale_),
                 coded);
  }

 private:
  __m512 scale_, zero_;
  __m512i table_;
};

// Converts a row, a word after the other.
template <class Numbers>
class RowNumbers {
 public:
  using Stored = typename Numbers::Stored;

  void open(const halve_quantized& w, int64_t row, uint8_t* spare) {
    w_ = &w, row_ = row, column_ = 0, bit_ = 0;
    group_end_[0] = group_end_[1] = 0;
    codes_ = codes_of(w, row, spare);
    mask_ = w.mask ? mask_of(w, row) : nullptr;
  }

  // Writes the next 64 columns.
  void put_word(const Decoder& decoder, Stored* out) {
    prefetch_codes(codes_ + bit_ / 8, codes_ahead);
    const uint64_t coded = mask_ ? read<uint64_t>(mask_, column_ / 64) : ~uint64_t{0};
    const __m512i codes = next_codes(decoder, coded);
    put_half(0, _mm512_castsi512_si256(codes), coded, out);
    put_half(1, _mm512_extracti64x4_epi64(codes, 1), coded >> 32, out + half_word);
    column_ += word_columns;
  }

 private:
  __m512i next_codes(const Decoder& decoder, uint64_t coded) {
    const __m512i dense = w_->bits == 8 ? _mm512_loadu_si512(codes_ + bit_ / 8)
                                        : decoder.narrow(codes_, bit_);
    if (mask_ == nullptr) {
      bit_ += word_columns * w_->bits;
      return dense;
    }
    prefetch_codes(mask_, column_ / 8 + code_mask_ahead);
    bit_ += __builtin_popcountll(coded) * w_->bits;
    return spread(in_register(_mm512_setzero_si512()), coded, dense);
  }

  void put_half(int half, __m256i codes, uint64_t coded, Stored* out) {
    GroupWeights<Numbers>& weights = weights_[half];
    enter_group(half);
    if (w_->bits == 8)
      return weights.put_bytes(out, codes, static_cast<__mmask32>(coded));
    weights.put_narrow(out, codes, static_cast<__mmask32>(coded));
  }

  void enter_group(int half) {
    const int64_t column = column_ + half * half_word;
    if (column < group_end_[half]) return;
    // Columns past the last one have the last group.
    const int64_t width = group_of(*w_);
    const int64_t group = smaller(column, w_->columns - 1) / width;
    group_end_[half] = (group + 1) * width;
    weights_[half].open(*w_, row_, group);
  }

  const halve_quantized* w_;
  const uint8_t *codes_, *mask_;
  int64_t row_, column_, group_end_[2];
  uint64_t bit_;
  GroupWeights<Numbers> weights_[2];
};

// ---- Rows ----

template <class Numbers>
void unpack_row(const halve_quantized& w, const Decoder& decoder,
                RowNumbers<Numbers>& row, typename Numbers::Stored* out) {
  const int64_t whole = w.columns / word_columns, rest = w.columns % word_columns;
  for (int64_t k = 0; k < whole; ++k, out += word_columns) {
    row.put_word(decoder, out);
  }
  if (rest == 0) return;
  typename Numbers::Stored last[word_columns];
  row.put_word(decoder, last);
  std::memcpy(out, last, rest * sizeof(*out));
}

template <class Numbers>
void unpack_rows(const halve_quantized& w, Range rows, void* out, void* workspace) {
  const Decoder decoder(w.bits, false);
  auto* dense = static_cast<typename Numbers::Stored*>(out);
  for (int64_t r = rows.first; r < rows.last; ++r, dense += w.columns) {
    RowNumbers<Numbers> row;
    row.open(w, r, static_cast<uint8_t*>(workspace));
    unpack_row(w, decoder, row, dense);
  }
}

}  // namespace

#endif
