// Products with integer codes for CPUs with AVX-512 VNNI, VBMI, VBMI2 and BF16.
//
// Up to four vectors are multiplied as integers: vpdpbusd adds products of unsigned
// codes and signed bytes of x. A 16-bit activation is two signed digits of 8 bits,
// hence two products. Weights without a code get the code of zero, so that no mask is
// needed after decoding. What the codes of zero add to a sum,
//
//   sum of (code - zero) * q  =  sum of code * q  -  zero * sum of q
//
// is subtracted as integers, in each lane of 32 bits, before a sum is converted to
// float32: nothing is lost where the two terms nearly cancel.

#include "quantized_rows_avx512.h"

namespace {

// From here on, vectors of bfloat16 are multiplied by a register tile, which decodes
// each row once for all of them. Measured: at 5 vectors both take the same time.
constexpr int64_t tile_batch = 6;

// More vectors' sums do not fit the registers.
constexpr int64_t most_vectors = 4;

// Rows that are multiplied with every chunk of a larger batch while they are in the
// cache.
constexpr int64_t block_rows = 16;

constexpr int64_t lanes = 16;

struct Half {
  static float to_float(uint16_t bits) { return _cvtsh_ss(bits); }
  static uint16_t from_float(float value) {
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  }
};

inline bool uses_tile(Precision precision, int64_t batch) {
  return precision.dtype == HALVE_BF16 && batch >= tile_batch;
}

inline int64_t digits_of(Precision precision) {
  return precision.activations == HALVE_INT8 ? 1 : 2;
}

// ---- Steps ----
// A step is a number of columns whose products are added as integers: a whole number of
// units, and as many vectors of 64 codes.

// Dense codes of 2 and 4 bits need no shuffles: each byte of 64 holds 4 or 2 codes, and
// x is arranged in the order in which shifting these bytes yields them.
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

// ---- A row's scales and zeros ----

// Of the units of a row, padded: scales times those of x, for each vector, and zeros as
// four equal bytes.
struct UnitScales {
  float* scales;    // [count][units]
  uint32_t* zeros;  // [units]
};

// Reads the scales and zeros of sixteen units at a time: their groups are neighbours,
// and a group wider than a unit is repeated. Single reads would take half as long as
// the product.
class UnitReader {
 public:
  UnitReader(const halve_quantized& w, int64_t row)
      : w_(w),
        groups_(groups_of(w)),
        width_(group_of(w) / unit_of(w)),
        zero_bytes_(zero_bytes_of(w)),
        scales_(static_cast<const uint8_t*>(w.scales) + 2 * row * groups_),
        zeros_(w.zeros ? zeros_of(w, row) : nullptr) {}

  // The sixteen units from `unit` on. Units past the last group have a scale of 0.
  __m512 scales(int64_t unit) const {
    const int64_t group = group_before(unit);
    const __m256i halves =
        _mm256_maskz_loadu_epi16(first_lanes(groups_ - group), scales_ + 2 * group);
    return _mm512_permutexvar_ps(places(unit, group), _mm512_cvtph_ps(halves));
  }

  __m512i zeros(int64_t unit) const {
    const int64_t group = group_before(unit), bit = group * w_.bits;
    const __m128i bytes =
        _mm_maskz_loadu_epi8(first_lanes(zero_bytes_ - bit / 8), zeros_ + bit / 8);
    const __m512i codes = _mm512_cvtepu8_epi32(w_.bits == 8 ? bytes : take(bytes, bit));
    const __m512i placed = _mm512_permutexvar_epi32(places(unit, group), codes);
    return _mm512_mullo_epi32(placed, _mm512_set1_epi32(0x01010101));
  }

 private:
  int64_t group_before(int64_t unit) const { return smaller(unit / width_, groups_); }

  // The group of each unit, counted from `group`; below 16. Sixteen units lie in two
  // groups at most if a group has as many units.
  __m512i places(int64_t unit, int64_t group) const {
    const __m512i lane = _mm512_load_si512(counted);
    if (width_ == 1) return lane;
    const int64_t first = unit - group * width_;
    if (width_ >= lanes) {
      const __mmask16 next = static_cast<__mmask16>(~first_lanes(width_ - first));
      return _mm512_maskz_set1_epi32(next, 1);
    }
    const __m512 middle = _mm512_set1_ps(static_cast<float>(first) + 0.5f);
    const __m512 units = _mm512_add_ps(_mm512_cvtepi32_ps(lane), middle);
    const __m512 width = _mm512_set1_ps(static_cast<float>(width_));
    return _mm512_cvttps_epi32(_mm512_div_ps(units, width));
  }

  // The codes from a bit of the first byte on.
  __m128i take(__m128i bytes, int64_t bit) const {
    const CodeTable& table = code_tables[0][w_.bits - 2];
    const auto* order = reinterpret_cast<const __m128i*>(table.bytes);
    const auto* shifts = reinterpret_cast<const __m128i*>(table.shifts[bit % 8]);
    const __m128i eights = _mm_permutexvar_epi8(_mm_load_si128(order), bytes);
    const __m128i codes = _mm_multishift_epi64_epi8(_mm_load_si128(shifts), eights);
    return _mm_and_si128(codes, _mm_set1_epi8(static_cast<char>((1 << w_.bits) - 1)));
  }

  alignas(64) static constexpr int32_t counted[lanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                         8, 9, 10, 11, 12, 13, 14, 15};

  const halve_quantized& w_;
  int64_t groups_, width_, zero_bytes_;
  const uint8_t *scales_, *zeros_;
};

// ---- Chunks ----

// A chunk of x as a kernel reads it.
struct Chunk {
  const uint8_t* steps;
  const float *scales, *half_sums;
};

inline Chunk chunk_of(const Layout& layout, const uint8_t* chunk, int64_t count) {
  return {chunk, reinterpret_cast<const float*>(chunk + layout.scale_offset(count)),
          reinterpret_cast<const float*>(chunk + layout.half_sum_offset(count))};
}

// What all rows share.
struct Context {
  const halve_quantized& w;
  Layout layout;
  Decoder decoder;
  UnitScales units;
  uint8_t* spare;
};

// Multiplies a row's scales with those of x. Zeros that lie half a step below a code
// are the middle code in the sums of integers; half a step times x is added here. (A
// weight is at least half a step, so this loses nothing to cancellation.)
template <int64_t count>
inline void open_units(const Context& c, const Chunk& x, int64_t row,
                       __m512 (&sums)[count]) {
  const UnitReader reader(c.w, row);
  const int64_t used = c.layout.units - lanes;
  const __m512 step = _mm512_set1_ps(doubles_codes(c.w) ? 0.5f : 1.0f);
  for (int64_t unit = 0; unit < used; unit += lanes) {
    const __m512 own = _mm512_mul_ps(reader.scales(unit), step);
    if (c.w.zeros) _mm512_storeu_si512(c.units.zeros + unit, reader.zeros(unit));
    for (int64_t b = 0; b < count; ++b) {
      const int64_t at = b * c.layout.units + unit;
      const __m512 both = _mm512_mul_ps(own, _mm512_loadu_ps(x.scales + at));
      _mm512_storeu_ps(c.units.scales + at, both);
      if (adds_half_steps(c.w)) {
        sums[b] = _mm512_fmadd_ps(both, _mm512_loadu_ps(x.half_sums + at), sums[b]);
      }
    }
  }
}

// ---- Sources of codes ----
// A source yields a row's codes as bytes, `vectors` times 64 for each step.

// Dense codes of 2 or 4 bits, interleaved.
template <int bits>
class InterleavedCodes {
 public:
  static constexpr int64_t vectors = 8 / bits;
  static constexpr bool masked = false;

  InterleavedCodes(const Context& c, int64_t row)
      : codes_(codes_of(c.w, row, c.spare)) {}

  void begin_step(__m512i) {
    step_ = _mm512_loadu_si512(codes_);
    prefetch_codes(codes_, codes_ahead);
    codes_ += 64;
  }

  // A shift of 16 bits carries bits of one byte into the other; `and` clears them.
  __m512i next(int64_t i) const {
    const __m512i low = in_register(_mm512_set1_epi8((1 << bits) - 1));
    return _mm512_and_si512(_mm512_srli_epi16(step_, static_cast<unsigned>(i * bits)),
                            low);
  }

 private:
  const uint8_t* codes_;
  __m512i step_;
};

// Dense codes of 3 or 8 bits.
template <int bits, int64_t vectors_>
class DenseCodes {
 public:
  static constexpr int64_t vectors = vectors_;
  static constexpr bool masked = false;

  DenseCodes(const Context& c, int64_t row)
      : decoder_(c.decoder), codes_(codes_of(c.w, row, c.spare)) {}

  // The hardware prefetcher follows 8 bits better when it is left alone.
  void begin_step(__m512i) {
    if (bits < 8) prefetch_codes(codes_, codes_ahead);
  }

  __m512i next(int64_t) {
    const uint8_t* codes = codes_;
    codes_ += 8 * bits;
    return bits == 8 ? _mm512_loadu_si512(codes) : decoder_.narrow(codes, 0);
  }

 private:
  Decoder decoder_;
  const uint8_t* codes_;
};

// Codes with a mask.
template <int bits, int64_t vectors_>
class MaskedCodes {
 public:
  static constexpr int64_t vectors = vectors_;
  static constexpr bool masked = true;

  MaskedCodes(const Context& c, int64_t row)
      : decoder_(c.decoder),
        codes_(codes_of(c.w, row, c.spare)),
        mask_(mask_of(c.w, row)),
        mask_end_(mask_of(c.w, row + 1)) {}

  void begin_step(__m512i zeros) {
    zeros_ = zeros;
    prefetch_codes(codes_ + bit_ / 8, codes_ahead);
    if (bits * vectors > 8) prefetch_codes(codes_ + bit_ / 8, codes_ahead + line);
    prefetch_codes(mask_, code_mask_ahead);
  }

  // A row of an odd number of words has none for the second half of its last step.
  __m512i next(int64_t) {
    if (vectors > 1 && mask_ == mask_end_) return zeros_;
    const uint64_t coded = read<uint64_t>(mask_, 0);
    const __m512i codes = bits == 8 ? _mm512_loadu_si512(codes_ + bit_ / 8)
                                    : decoder_.narrow(codes_, bit_);
    mask_ += sizeof(coded);
    bit_ += bits * __builtin_popcountll(coded);
    return spread(zeros_, coded, codes);
  }

 private:
  Decoder decoder_;
  const uint8_t *codes_, *mask_, *mask_end_;
  uint64_t bit_ = 0;
  __m512i zeros_;
};

// ---- Products ----

// The sums of one step, for each vector and digit.
template <int64_t digits, int64_t count>
struct StepSums {
  __m512i sums[count][digits];

  // The low digit begins with what the zeros add, less than nothing.
  explicit StepSums(const __m512i (&corrections)[count]) {
    HALVE_UNROLL
    for (int64_t b = 0; b < count; ++b) {
      sums[b][0] = _mm512_setzero_si512();
      sums[b][digits - 1] = corrections[b];
    }
  }

  void add(__m512i codes, const uint8_t* x) {
    HALVE_UNROLL
    for (int64_t b = 0; b < count; ++b) {
      HALVE_UNROLL
      for (int64_t d = 0; d < digits; ++d, x += word_columns) {
        sums[b][d] = _mm512_dpbusd_epi32(sums[b][d], codes, _mm512_load_si512(x));
      }
    }
  }

  __m512 total(int64_t b) const {
    if constexpr (digits == 1) return _mm512_cvtepi32_ps(sums[b][0]);
    return _mm512_cvtepi32_ps(
        _mm512_add_epi32(_mm512_slli_epi32(sums[b][0], 8), sums[b][1]));
  }
};

// Loads a step's units and gives each lane its own: `lane_units` says which.
inline __m512 scale_lanes(const float* scales, __m512i lane_units) {
  const __m512 some = _mm512_castps256_ps512(_mm256_loadu_ps(scales));
  return _mm512_permutexvar_ps(lane_units, some);
}

inline __m512i zero_lanes(const uint32_t* zeros, __m512i lane_units) {
  const auto* from = reinterpret_cast<const __m256i*>(zeros);
  const __m512i some = _mm512_castsi256_si512(_mm256_loadu_si256(from));
  return _mm512_permutexvar_epi32(lane_units, some);
}

// The unit of each lane of a step of `units` units: 0, ..., 0, 1, ..., units - 1.
inline __m512i lane_units(int64_t units) {
  const __m512i lane =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int shift = 4 - __builtin_ctzll(static_cast<uint64_t>(units));
  return _mm512_srl_epi32(lane, _mm_cvtsi32_si128(shift));
}

template <class Source, int64_t digits, int64_t count>
inline void add_row(const Context& c, const Chunk& chunk, int64_t row,
                    __m512 (&sums)[count]) {
  constexpr int64_t vectors = Source::vectors;
  constexpr int64_t vector_bytes = count * digits * word_columns;
  const int64_t units = c.layout.columns / c.layout.unit;
  const __m512i unit_of_lane = lane_units(units);
  const bool own_zeros = c.w.zeros != nullptr;
  __m512i zeros = _mm512_set1_epi8(static_cast<char>(common_zero(c.w)));
  Source source(c, row);
  const uint8_t* x = chunk.steps;
  for (int64_t step = 0; step < c.layout.steps; ++step) {
    __m512i corrections[count];
    const uint8_t* from = x + vectors * vector_bytes;
    HALVE_UNROLL
    for (int64_t b = 0; b < count; ++b) {
      corrections[b] = _mm512_load_si512(from + b * word_columns);
    }
    if (own_zeros) {
      zeros = zero_lanes(c.units.zeros + step * units, unit_of_lane);
      const __m512i times = _mm512_srli_epi32(zeros, 24);
      HALVE_UNROLL
      for (int64_t b = 0; b < count; ++b) {
        corrections[b] = _mm512_mullo_epi32(corrections[b], times);
      }
    }
    source.begin_step(zeros);
    StepSums<digits, count> products(corrections);
    HALVE_UNROLL
    for (int64_t i = 0; i < vectors; ++i, x += vector_bytes) {
      products.add(source.next(i), x);
    }
    x += count * word_columns;
    HALVE_UNROLL
    for (int64_t b = 0; b < count; ++b) {
      const float* scales = c.units.scales + b * c.layout.units + step * units;
      sums[b] = _mm512_fmadd_ps(products.total(b), scale_lanes(scales, unit_of_lane),
                                sums[b]);
    }
  }
}

// ---- Rows ----

template <class Source, int64_t digits, int64_t count>
void multiply_rows(const Context& c, const Chunk& x, const Operands& o, int32_t dtype,
                   int64_t first_vector, Range rows) {
  for (int64_t row = rows.first; row < rows.last; ++row) {
    __m512 sums[count];
    for (int64_t b = 0; b < count; ++b) sums[b] = _mm512_setzero_ps();
    open_units(c, x, row, sums);
    add_row<Source, digits>(c, x, row, sums);
    for (int64_t b = 0; b < count; ++b) {
      const float sum = _mm512_reduce_add_ps(sums[b]);
      put_result<Half>(o, dtype, c.w.rows, first_vector + b, row, sum);
    }
  }
}

using MultiplyRows = void (*)(const Context&, const Chunk&, const Operands&, int32_t,
                              int64_t, Range);

template <class Source>
MultiplyRows of_source(int64_t digits, int64_t count) {
  MultiplyRows found = nullptr;
  with_count<most_vectors>(count, [&](auto n) {
    found = digits == 1 ? multiply_rows<Source, 1, n.value>
                        : multiply_rows<Source, 2, n.value>;
  });
  return found;
}

template <int bits>
MultiplyRows of_bits(const halve_quantized& w, int64_t digits, int64_t count) {
  const bool two = step_vectors(w) == 2;
  if (w.mask) {
    return two ? of_source<MaskedCodes<bits, 2>>(digits, count)
               : of_source<MaskedCodes<bits, 1>>(digits, count);
  }
  if constexpr (bits == 2 || bits == 4) {
    return of_source<InterleavedCodes<bits>>(digits, count);
  } else {
    return two ? of_source<DenseCodes<bits, 2>>(digits, count)
               : of_source<DenseCodes<bits, 1>>(digits, count);
  }
}

MultiplyRows multiply_rows_of(const halve_quantized& w, int64_t digits, int64_t count) {
  if (w.bits == 2) return of_bits<2>(w, digits, count);
  if (w.bits == 3) return of_bits<3>(w, digits, count);
  if (w.bits == 4) return of_bits<4>(w, digits, count);
  return of_bits<8>(w, digits, count);
}

// Multiplies a few rows with the whole batch, a chunk after the other.
void multiply_block(const Context& c, Precision precision, const Operands& o,
                    Range rows) {
  const auto* arranged = static_cast<const uint8_t*>(o.x);
  for (int64_t b = 0; b < o.batch; b += most_vectors) {
    const int64_t count = smaller(most_vectors, o.batch - b);
    const auto multiply = multiply_rows_of(c.w, c.layout.digits, count);
    multiply(c, chunk_of(c.layout, arranged, count), o, precision.dtype, b, rows);
    arranged += c.layout.chunk_bytes(count);
  }
}

Context context_of(const halve_quantized& w, Precision precision, void* workspace) {
  const Layout layout(w, precision);
  auto* scales = static_cast<float*>(workspace);
  auto* zeros = reinterpret_cast<uint32_t*>(scales + most_vectors * layout.units);
  auto* spare = reinterpret_cast<uint8_t*>(zeros + layout.units);
  return {w, layout, Decoder(w.bits, doubles_codes(w)), {scales, zeros}, spare};
}

void integer_product(const halve_quantized& w, Precision precision, const Operands& o,
                     Range rows, void* workspace) {
  const Context context = context_of(w, precision, workspace);
  const int64_t together =
      o.batch <= most_vectors ? rows.last - rows.first : block_rows;
  for (int64_t row = rows.first; row < rows.last; row += together) {
    const Range block = {row, smaller(row + together, rows.last)};
    multiply_block(context, precision, o, block);
  }
}

void arrange_integers(const halve_quantized& w, Precision precision, const void* x,
                      int64_t batch, void* arranged) {
  const Layout layout(w, precision);
  auto* chunk = static_cast<uint8_t*>(arranged);
  for (int64_t b = 0; b < batch; b += most_vectors) {
    const int64_t count = smaller(most_vectors, batch - b);
    for (int64_t i = 0; i < count; ++i) {
      VectorWriter(w, precision, chunk, count, i).write(x, (b + i) * w.columns);
    }
    chunk += layout.chunk_bytes(count);
  }
}

// ---- The functions of a kernel ----

double arranged_bytes(const halve_quantized& w, Precision precision, int64_t batch) {
  if (uses_tile(precision, batch)) {
    return arranged_bytes<Bfloat16Lanes>(batch, w.columns);
  }
  const Layout layout(w, precision);
  return double(layout.chunk_bytes(1)) * batch;
}

double workspace_bytes(const halve_quantized& w, Precision precision, int64_t batch) {
  if (uses_tile(precision, batch)) return tile_workspace_bytes(w, batch);
  const Layout layout(w, precision);
  return 4.0 * (most_vectors + 1) * layout.units + readable_bytes(w);
}

void arrange(const halve_quantized& w, Precision precision, const void* x,
             int64_t batch, void* arranged) {
  if (uses_tile(precision, batch)) return arrange_tile(w, x, batch, arranged);
  arrange_integers(w, precision, x, batch, arranged);
}

void product(const halve_quantized& w, Precision precision, const Operands& o,
             Range rows, void* workspace) {
  if (uses_tile(precision, o.batch)) return tile_product(w, o, rows, workspace);
  integer_product(w, precision, o, rows, workspace);
}

void unpack(const halve_quantized& w, int32_t dtype, Range rows, void* out,
            void* workspace) {
  const auto unpack_as = dtype == HALVE_F32   ? unpack_rows<Float32Numbers>
                         : dtype == HALVE_F16 ? unpack_rows<Float16Numbers>
                                              : unpack_rows<Bfloat16Numbers>;
  unpack_as(w, rows, out, workspace);
}

}  // namespace

const halve::QuantizedKernel halve::avx512bf16_quantized_kernel = {
    arranged_bytes, workspace_bytes, arrange, product, unpack};
