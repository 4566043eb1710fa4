// Turns x into integers in the order in which the products of quantized_avx512.cpp read
// them.

#ifndef HALVE_ACTIVATIONS_AVX512_H
#define HALVE_ACTIVATIONS_AVX512_H

#include "codes_avx512.h"

namespace {

constexpr int64_t lanes = 16;

inline int64_t digits_of(Precision precision) {
  return precision.activations == HALVE_INT8 ? 1 : 2;
}

// ---- Steps ----
// A step is a number of columns whose products are added as integers: a whole number of
// units, and as many vectors of 64 codes.

// See InterleavedCodes.
inline bool interleaves(const halve_quantized& w) {
  return w.mask == nullptr && (w.bits == 2 || w.bits == 4);
}

// Vectors of 64 codes in a step.
inline int64_t step_vectors(const halve_quantized& w) {
  if (interleaves(w)) return 8 / w.bits;
  return unit_of(w) == widest_unit ? 2 : 1;
}

// ---- The layout of x ----

// A chunk of the batch:
//   for each step:  [vectors][count][digits][64 bytes]  digits of the integers
//                   [count][16 lanes, int32]            what their zeros add
//   scales          [count][units, padded], float32
//   half sums       [count][units, padded], float32
struct Layout {
  int64_t vectors, digits, columns;  // of a step
  int64_t unit, steps, units;        // units are padded, so that 16 can be loaded

  Layout(const halve_quantized& w, Precision precision)
      : vectors(step_vectors(w)),
        digits(digits_of(precision)),
        columns(vectors * word_columns),
        unit(unit_of(w)),
        steps(ceil_divide(w.columns, columns)),
        units(round_up(steps * (columns / unit) + lanes, lanes)) {}

  int64_t used_units() const { return units - lanes; }
  int64_t step_bytes(int64_t count) const {
    return count * (vectors * digits + 1) * word_columns;
  }
  int64_t scale_offset(int64_t count) const { return steps * step_bytes(count); }
  int64_t half_sum_offset(int64_t count) const {
    return scale_offset(count) + count * units * int64_t{sizeof(float)};
  }
  int64_t chunk_bytes(int64_t count) const {
    return half_sum_offset(count) + count * units * int64_t{sizeof(float)};
  }
};

// ---- Arranging x ----

// Loads sixteen numbers of x, from a vector's column on, as float32.
inline __m512 load_numbers(const void* x, int32_t dtype, int64_t index,
                           __mmask16 some) {
  if (dtype == HALVE_F32) {
    return _mm512_maskz_loadu_ps(some, static_cast<const float*>(x) + index);
  }
  const auto* from = static_cast<const uint16_t*>(x) + index;
  const __m256i bits = _mm256_maskz_loadu_epi16(some, from);
  if (dtype == HALVE_F16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// A unit of x: its scale, and the sum of its integers, which are written to `integers`.
struct QuantizedUnit {
  float scale, sum;
};

// Computes what `quantize` of quantized.h does, to the bit.
inline QuantizedUnit quantize_sixteens(const __m512* x, int64_t count, float limit,
                                       int16_t* integers) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 not_finite = 0;
  for (int64_t i = 0; i < count; ++i) {
    not_finite |= _mm512_fpclass_ps_mask(x[i], 0x99);  // infinities and NaNs
    largest = _mm512_max_ps(largest, _mm512_abs_ps(x[i]));
  }
  const float size = _mm512_reduce_max_ps(largest);
  const bool usable = not_finite == 0 && size >= smallest_activation;
  const __m512 inverse = _mm512_set1_ps(usable ? limit / size : 0.0f);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; ++i) {
    const __mmask16 all = usable ? 0xffff : 0;
    const __m512i q = _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(x[i], inverse));
    sum = _mm512_add_epi32(sum, q);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(integers + 16 * i),
                        _mm512_cvtepi32_epi16(q));
  }
  const float scale = usable ? size / limit : not_finite ? __builtin_nanf("") : 0.0f;
  return {scale, static_cast<float>(_mm512_reduce_add_epi32(sum))};
}

// Splits `ways` registers of bytes into those of the bytes 0, 1, ... of each `ways`.
template <int64_t ways>
inline void deal(__m512i* v) {
  if constexpr (ways > 1) {
    alignas(64) uint8_t even_bytes[64];
    for (int i = 0; i < 64; ++i) even_bytes[i] = static_cast<uint8_t>(2 * i);
    const __m512i even = _mm512_load_si512(even_bytes);
    const __m512i odd = _mm512_add_epi8(even, _mm512_set1_epi8(1));
    constexpr int64_t half = ways / 2;
    __m512i evens[half], odds[half];
    for (int64_t i = 0; i < half; ++i) {
      evens[i] = _mm512_permutex2var_epi8(v[2 * i], even, v[2 * i + 1]);
      odds[i] = _mm512_permutex2var_epi8(v[2 * i], odd, v[2 * i + 1]);
    }
    deal<half>(evens);
    deal<half>(odds);
    for (int64_t i = 0; i < half; ++i) v[2 * i] = evens[i], v[2 * i + 1] = odds[i];
  }
}

// Loads one digit of 64 integers, as bytes. q = 256 * high + low, both signed: the high
// digit is q + 128 shifted right, and the low one is the lowest byte.
inline __m512i load_digit(const int16_t* integers, bool high) {
  __m512i q[2];
  for (int i = 0; i < 2; ++i) {
    q[i] = _mm512_loadu_si512(integers + 32 * i);
    if (high)
      q[i] = _mm512_srai_epi16(_mm512_add_epi16(q[i], _mm512_set1_epi16(128)), 8);
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(q[0])),
                            _mm512_cvtepi16_epi8(q[1]), 1);
}

// Writes one digit of a step's integers, vectors `apart` bytes apart, and returns its
// sum in each lane.
template <int64_t vectors>
inline __m512i put_digit(const int16_t* integers, bool high, bool interleaved,
                         uint8_t* out, int64_t apart) {
  __m512i v[vectors];
  for (int64_t i = 0; i < vectors; ++i) v[i] = load_digit(integers + 64 * i, high);
  if (interleaved) deal<vectors>(v);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < vectors; ++i) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), v[i]);
    _mm512_store_si512(out + i * apart, v[i]);
  }
  return sum;
}

inline __m512i put_digits(const int16_t* integers, int64_t vectors, bool high,
                          bool interleaved, uint8_t* out, int64_t apart) {
  const auto put = vectors == 4   ? put_digit<4>
                   : vectors == 2 ? put_digit<2>
                                  : put_digit<1>;
  return put(integers, high, interleaved, out, apart);
}

// The integer zero, or 1 where zeros differ: the sums of x are then multiplied by them
// for each row.
inline int32_t common_zero(const halve_quantized& w) {
  return w.zeros != nullptr ? 1 : integer_zero(w, 0, 0);
}

// One vector of a chunk.
class VectorWriter {
 public:
  VectorWriter(const halve_quantized& w, Precision precision, uint8_t* chunk,
               int64_t count, int64_t index)
      : w_(w),
        precision_(precision),
        layout_(w, precision),
        digits_(chunk + index * layout_.digits * word_columns),
        corrections_(chunk +
                     (count * layout_.vectors * layout_.digits + index) * word_columns),
        step_bytes_(layout_.step_bytes(count)),
        apart_(count * layout_.digits * word_columns),
        scales_(reinterpret_cast<float*>(chunk + layout_.scale_offset(count)) +
                index * layout_.units),
        half_sums_(reinterpret_cast<float*>(chunk + layout_.half_sum_offset(count)) +
                   index * layout_.units) {}

  void write(const void* x, int64_t first) {
    std::memset(scales_, 0, layout_.units * sizeof(float));
    std::memset(half_sums_, 0, layout_.units * sizeof(float));
    for (int64_t step = 0; step < layout_.steps; ++step) {
      write_units(x, first, step);
      write_step(step);
    }
  }

 private:
  // Columns past the last one become zeros.
  void write_units(const void* x, int64_t first, int64_t step) {
    const int64_t unit = layout_.unit, per_step = layout_.columns / unit;
    const float limit = largest_integer(precision_.activations);
    for (int64_t u = 0; u < per_step; ++u) {
      const int64_t column = step * layout_.columns + u * unit;
      __m512 numbers[widest_unit / lanes];
      for (int64_t i = 0; i < unit; i += lanes) {
        const __mmask16 some = first_lanes(w_.columns - column - i);
        numbers[i / lanes] =
            load_numbers(x, precision_.dtype, first + column + i, some);
      }
      const QuantizedUnit q =
          quantize_sixteens(numbers, unit / lanes, limit, integers_ + u * unit);
      scales_[step * per_step + u] = q.scale;
      half_sums_[step * per_step + u] = q.sum / 2;
    }
  }

  void write_step(int64_t step) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < layout_.digits; ++d) {
      const bool high = d + 1 < layout_.digits;
      uint8_t* out = digits_ + step * step_bytes_ + d * word_columns;
      const __m512i part =
          put_digits(integers_, layout_.vectors, high, interleaves(w_), out, apart_);
      sum = _mm512_add_epi32(sum, high ? _mm512_slli_epi32(part, 8) : part);
    }
    const __m512i zero = _mm512_set1_epi32(-common_zero(w_));
    _mm512_store_si512(corrections_ + step * step_bytes_,
                       _mm512_mullo_epi32(sum, zero));
  }

  const halve_quantized& w_;
  Precision precision_;
  Layout layout_;
  uint8_t *digits_, *corrections_;
  int64_t step_bytes_, apart_;
  float *scales_, *half_sums_;
  alignas(64) int16_t integers_[4 * word_columns];
};

// Writes a chunk: `count` vectors, the first of which begins at number `first` of x.
inline void write_chunk(const halve_quantized& w, Precision precision, const void* x,
                        int64_t first, int64_t count, uint8_t* chunk) {
  for (int64_t i = 0; i < count; ++i) {
    VectorWriter(w, precision, chunk, count, i).write(x, first + i * w.columns);
  }
}

}  // namespace

#endif
