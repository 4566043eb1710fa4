// Products with integer codes for CPUs with AVX-512 VNNI, VBMI, VBMI2 and BF16 (which
// only unpacking needs).
//
// vpdpbusd adds products of unsigned codes and signed bytes of x. A 16-bit activation
// is two signed digits of 8 bits, hence two products. Weights without a code get the
// code of zero, so that no mask is needed after decoding. What the codes of zero add to
// a sum,
//
//   sum of (code - zero) * q  =  sum of code * q  -  zero * sum of q
//
// is subtracted as integers, in each lane of 32 bits, before a sum is converted to
// float32: nothing is lost where the two terms nearly cancel.
//
// A few vectors are multiplied with one row at a time. Many are multiplied with a tile
// of rows, whose codes are decoded once for all of them. Both add the same numbers in
// the same order: the result for a vector does not depend on the others of its batch.

#include "generic.h"
#include "sum_eight.h"
#include "unit_scales_avx512.h"
#include "unpack_codes_avx512.h"

namespace {

// The vectors of a chunk: more would not fit the registers.
constexpr int64_t most_vectors = 4;

// Larger batches are multiplied by a tile.
constexpr int64_t few_vectors = 4;

// Vectors that share a tile, and chunks of them. More would not fit the L2 cache.
constexpr int64_t tile_vectors = 64;

// Vectors of 64 codes of each row in a tile: so few that they and the matching columns
// of x stay in the L1 cache. A multiple of the vectors in any step.
constexpr int64_t block_vectors = 16;

// Rows of a tile: a multiple of 8.
constexpr int64_t tile_height = 16;

// Rows that are multiplied at once.
constexpr int64_t pair = 2;
static_assert(tile_height % pair == 0 && tile_vectors % most_vectors == 0);

struct Half {
  static float to_float(uint16_t bits) { return _cvtsh_ss(bits); }
  static uint16_t from_float(float value) {
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  }
};

// ---- What all rows share ----

// A chunk of x.
struct Chunk {
  const uint8_t* steps;
  const float *scales, *half_sums;
};

inline Chunk chunk_of(const Layout& layout, const void* arranged, int64_t first_vector,
                      int64_t count) {
  const auto* chunk =
      static_cast<const uint8_t*>(arranged) + layout.chunk_bytes(first_vector);
  return {chunk, reinterpret_cast<const float*>(chunk + layout.scale_offset(count)),
          reinterpret_cast<const float*>(chunk + layout.half_sum_offset(count))};
}

// The unit of each lane of a step of `units` units: 0, ..., 0, 1, ..., units - 1.
inline __m512i units_of_lanes(int64_t units) {
  const __m512i lane =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int shift = 4 - __builtin_ctzll(static_cast<uint64_t>(units));
  return _mm512_srl_epi32(lane, _mm_cvtsi32_si128(shift));
}

struct Context {
  const halve_quantized& w;
  Precision precision;
  const Operands& o;
  Layout layout;
  Decoder decoder;
  UnitReader units;
  int64_t step_units;
  __m512i unit_of_lane, common_zeros;

  Context(const halve_quantized& w, Precision precision, const Operands& o)
      : w(w),
        precision(precision),
        o(o),
        layout(w, precision),
        decoder(w.bits, doubles_codes(w)),
        units(w),
        step_units(layout.columns / layout.unit),
        unit_of_lane(units_of_lanes(step_units)),
        common_zeros(_mm512_set1_epi8(static_cast<char>(common_zero(w)))) {}
};

// ---- A row's scales and zeros ----

inline void read_units(const Context& c, int64_t row, const UnitScales& units) {
  UnitReader reader = c.units;
  reader.open(row);
  const __m512 step = _mm512_set1_ps(doubles_codes(c.w) ? 0.5f : 1.0f);
  for (int64_t unit = 0; unit < c.layout.used_units(); unit += lanes) {
    _mm512_storeu_ps(units.own + unit, _mm512_mul_ps(reader.scales(unit), step));
    if (c.w.zeros) _mm512_storeu_si512(units.zeros + unit, reader.zeros(unit));
  }
}

// Multiplies a row's scales with those of one vector of x, and returns what its sum
// begins with: see adds_half_steps.
inline __m512 open_vector(const Context& c, const Chunk& x, int64_t b, const float* own,
                          float* scales) {
  const int64_t first = b * c.layout.units;
  const bool half_steps = adds_half_steps(c.w);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t unit = 0; unit < c.layout.used_units(); unit += lanes) {
    const __m512 of_x = _mm512_loadu_ps(x.scales + first + unit);
    const __m512 both = _mm512_mul_ps(_mm512_loadu_ps(own + unit), of_x);
    _mm512_storeu_ps(scales + unit, both);
    if (!half_steps) continue;
    sum = _mm512_fmadd_ps(both, _mm512_loadu_ps(x.half_sums + first + unit), sum);
  }
  return sum;
}

// Loads a step's units and gives each lane its own.
inline __m512 scale_lanes(const Context& c, const float* scales, int64_t step) {
  const __m256 some = _mm256_loadu_ps(scales + step * c.step_units);
  return _mm512_permutexvar_ps(c.unit_of_lane, _mm512_castps256_ps512(some));
}

// The zero of each lane's unit, as four equal bytes.
inline __m512i zero_lanes(const Context& c, const UnitScales& units, int64_t step) {
  if (c.w.zeros == nullptr) return c.common_zeros;
  const uint32_t* zeros = units.zeros + step * c.step_units;
  const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(zeros));
  return _mm512_permutexvar_epi32(c.unit_of_lane, _mm512_castsi256_si512(some));
}

// ---- Steps ----

// The sums of one step of a row, for each vector and digit.
template <int64_t digits, int64_t count>
struct StepSums {
  __m512i sums[count][digits];

  // The low digit begins with what the zeros add, less than nothing.
  void begin(const Context& c, const uint8_t* corrections, __m512i zeros) {
    HALVE_UNROLL
    for (int64_t b = 0; b < count; ++b) {
      sums[b][0] = _mm512_setzero_si512();
      sums[b][digits - 1] = _mm512_load_si512(corrections + b * word_columns);
    }
    if (c.w.zeros == nullptr) return;
    const __m512i times = _mm512_srli_epi32(zeros, 24);
    HALVE_UNROLL
    for (int64_t b = 0; b < count; ++b) {
      sums[b][digits - 1] = _mm512_mullo_epi32(sums[b][digits - 1], times);
    }
  }

  void add(int64_t b, int64_t digit, __m512i codes, __m512i x) {
    sums[b][digit] = _mm512_dpbusd_epi32(sums[b][digit], codes, x);
  }

  __m512 total(int64_t b) const {
    if constexpr (digits == 1) return _mm512_cvtepi32_ps(sums[b][0]);
    return _mm512_cvtepi32_ps(
        _mm512_add_epi32(_mm512_slli_epi32(sums[b][0], 8), sums[b][1]));
  }
};

// Adds the products of 64 columns with `height` rows; x is loaded once for all of them.
template <int64_t digits, int64_t count, int64_t height>
inline void add_products(StepSums<digits, count> (&products)[height],
                         const __m512i (&codes)[height], const uint8_t* x) {
  HALVE_UNROLL
  for (int64_t b = 0; b < count; ++b) {
    HALVE_UNROLL
    for (int64_t d = 0; d < digits; ++d, x += word_columns) {
      // Otherwise the compiler loads it again for every row.
      const __m512i part = in_register(_mm512_load_si512(x));
      HALVE_UNROLL
      for (int64_t h = 0; h < height; ++h) products[h].add(b, d, codes[h], part);
    }
  }
}

// `one_unit`: a step is a unit, so that all lanes have the same scale.
template <bool one_unit, int64_t digits, int64_t count>
inline void add_step(const Context& c, const StepSums<digits, count>& products,
                     const UnitScales& units, int64_t step, __m512 (&sums)[count]) {
  HALVE_UNROLL
  for (int64_t b = 0; b < count; ++b) {
    const float* of_vector = units.scales + b * c.layout.units;
    const __m512 scales =
        one_unit ? _mm512_set1_ps(of_vector[step]) : scale_lanes(c, of_vector, step);
    sums[b] = _mm512_fmadd_ps(products.total(b), scales, sums[b]);
  }
}

// The total of a row, in the order of sum_eight.
inline float total_of(__m512 sum) {
  const __m256 high = _mm512_extractf32x8_ps(sum, 1);
  __m256 part = _mm256_add_ps(_mm512_castps512_ps256(sum), high);
  part = _mm256_hadd_ps(part, part);
  part = _mm256_hadd_ps(part, part);
  return _mm_cvtss_f32(
      _mm_add_ss(_mm256_castps256_ps128(part), _mm256_extractf128_ps(part, 1)));
}

inline void put(const Context& c, int64_t b, int64_t row, float sum) {
  put_result<Half>(c.o, c.precision.dtype, c.w.rows, b, row, sum);
}

// ---- A few vectors ----

struct RowSpace {
  UnitScales units;
  uint8_t* spare;
};

template <class Source, int64_t digits, int64_t count>
inline void add_row(const Context& c, const uint8_t* x, Source& source,
                    const UnitScales& units, __m512 (&sums)[count]) {
  constexpr int64_t vector_bytes = count * digits * word_columns;
  constexpr int64_t corrections = Source::vectors * vector_bytes;
  const Context local = c;
  for (int64_t step = 0; step < local.layout.steps; ++step) {
    const __m512i zeros = zero_lanes(local, units, step);
    StepSums<digits, count> products[1];
    products[0].begin(local, x + corrections, zeros);
    source.begin_step(zeros);
    HALVE_UNROLL
    for (int64_t i = 0; i < Source::vectors; ++i, x += vector_bytes) {
      add_products(products, {source.next(i, local.decoder)}, x);
    }
    x += count * word_columns;
    add_step<false>(local, products[0], units, step, sums);
  }
}

template <class Source, int64_t digits, int64_t count>
void multiply_few(const Context& c, Range rows, const RowSpace& space) {
  const Chunk x = chunk_of(c.layout, c.o.x, 0, count);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    __m512 sums[count];
    read_units(c, row, space.units);
    for (int64_t b = 0; b < count; ++b) {
      float* scales = space.units.scales + b * c.layout.units;
      sums[b] = open_vector(c, x, b, space.units.own, scales);
    }
    Source source;
    source.open(c.w, row, space.spare, codes_ahead);
    add_row<Source, digits>(c, x.steps, source, space.units, sums);
    for (int64_t b = 0; b < count; ++b) put(c, b, row, total_of(sums[b]));
  }
}

// ---- Many vectors ----

struct TileRow : RowSpace {
  const uint8_t* upcoming;  // codes of the next tile, to be prefetched
  int64_t next_tile;        // the bytes from a row's codes to theirs
};

struct TileSpace {
  uint8_t* codes;  // [block_vectors][tile_height][64]
  __m512* sums;    // [tile_vectors][tile_height]
  TileRow rows[tile_height];
};

// Decodes the next steps of the rows of a tile.
template <class Source>
void fill_tile(const Context& c, Source (&sources)[tile_height], TileSpace& space,
               Range steps) {
  const Decoder decoder = c.decoder;
  for (int64_t r = 0; r < tile_height; ++r) {
    uint8_t* out = space.codes + r * word_columns;
    Source source = sources[r];  // a copy stays in registers
    for (int64_t step = steps.first; step < steps.last; ++step) {
      source.begin_step(zero_lanes(c, space.rows[r].units, step));
      HALVE_UNROLL
      for (int64_t i = 0; i < Source::vectors; ++i, out += tile_height * word_columns) {
        _mm512_store_si512(out, source.next(i, decoder));
      }
    }
    space.rows[r].upcoming = source.position() + space.rows[r].next_tile;
    sources[r] = source;
  }
}

// Multiplies two rows of a tile, from row `first` on, with a chunk that begins at
// vector `b` of the tile's.
template <int64_t vectors, bool one_unit, int64_t digits, int64_t count>
void multiply_pair(const Context& c, const Chunk& x, const TileSpace& space,
                   int64_t first, int64_t b, Range steps) {
  constexpr int64_t vector_bytes = count * digits * word_columns;
  constexpr int64_t corrections = vectors * vector_bytes;
  const Context local = c;
  const uint8_t* codes = space.codes + first * word_columns;
  const uint8_t* part = x.steps + steps.first * local.layout.step_bytes(count);
  UnitScales units[pair];
  __m512 sums[pair][count];
  HALVE_UNROLL
  for (int64_t h = 0; h < pair; ++h) {
    units[h] = space.rows[first + h].units;
    units[h].scales += b * local.layout.units;
    HALVE_UNROLL
    for (int64_t i = 0; i < count; ++i) {
      sums[h][i] = space.sums[(b + i) * tile_height + first + h];
    }
  }
  for (int64_t step = steps.first; step < steps.last; ++step) {
    StepSums<digits, count> products[pair];
    HALVE_UNROLL
    for (int64_t h = 0; h < pair; ++h) {
      const __m512i zeros = zero_lanes(local, units[h], step);
      products[h].begin(local, part + corrections, zeros);
    }
    HALVE_UNROLL
    for (int64_t i = 0; i < vectors; ++i, codes += tile_height * word_columns) {
      add_products(products,
                   {_mm512_load_si512(codes), _mm512_load_si512(codes + word_columns)},
                   part);
      part += vector_bytes;
    }
    part += count * word_columns;
    HALVE_UNROLL
    for (int64_t h = 0; h < pair; ++h) {
      add_step<one_unit>(local, products[h], units[h], step, sums[h]);
    }
  }
  HALVE_UNROLL
  for (int64_t h = 0; h < pair; ++h) {
    HALVE_UNROLL
    for (int64_t i = 0; i < count; ++i) {
      space.sums[(b + i) * tile_height + first + h] = sums[h][i];
    }
  }
}

// Calls `use(chunk, first vector, count)` for each chunk of some vectors; the first of
// a chunk is counted from `vectors.first`.
template <class Use>
inline void for_each_chunk(const Context& c, Range vectors, Use use) {
  for (int64_t b = vectors.first; b < vectors.last; b += most_vectors) {
    const int64_t count = smaller(most_vectors, vectors.last - b);
    use(chunk_of(c.layout, c.o.x, b, count), b - vectors.first, count);
  }
}

// Prefetches part `index` of `parts` of what two rows of the next tile need for a
// block. Prefetching it all while a tile is filled would be to wait for it.
inline void prefetch_pair(const Context& c, const TileSpace& space, int64_t first,
                          int64_t index, int64_t parts) {
  const int64_t lines = block_vectors * c.w.bits / 8;
  for (int64_t i = lines * index / parts; i < lines * (index + 1) / parts; ++i) {
    for (int64_t r = first; r < first + pair; ++r) {
      prefetch_codes(space.rows[r].upcoming, i * code_line);
    }
  }
}

template <int64_t vectors, int64_t digits>
void multiply_tile(const Context& c, Range batch, const TileSpace& space, Range steps) {
  const int64_t chunks = ceil_divide(batch.last - batch.first, most_vectors);
  for_each_chunk(c, batch, [&](const Chunk& x, int64_t b, int64_t some) {
    with_count<most_vectors>(some, [&](auto count) {
      const auto multiply = c.step_units == 1
                                ? multiply_pair<vectors, true, digits, count.value>
                                : multiply_pair<vectors, false, digits, count.value>;
      for (int64_t r = 0; r < tile_height; r += pair) {
        prefetch_pair(c, space, r, b / most_vectors, chunks);
        multiply(c, x, space, r, b, steps);
      }
    });
  });
}

// The bytes from a row's codes to those of the same row of the next tile.
inline int64_t next_tile(const Context& c, int64_t row) {
  const int64_t later = smaller(row + tile_height, c.w.rows - 1);
  return first_byte_of(c.w, later) - first_byte_of(c.w, row);
}

// A short last tile repeats its last row, so that there is no second loop for it.
template <class Source>
void open_tile(const Context& c, Range batch, Range rows, TileSpace& space,
               Source (&sources)[tile_height]) {
  for (int64_t r = 0; r < tile_height; ++r) {
    const int64_t row = smaller(rows.first + r, rows.last - 1);
    sources[r].open(c.w, row, space.rows[r].spare, 0);
    space.rows[r].next_tile = next_tile(c, row);
    read_units(c, row, space.rows[r].units);
  }
  for_each_chunk(c, batch, [&](const Chunk& x, int64_t first, int64_t count) {
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t r = 0; r < tile_height; ++r) {
        const UnitScales& units = space.rows[r].units;
        float* scales = units.scales + (first + b) * c.layout.units;
        space.sums[(first + b) * tile_height + r] =
            open_vector(c, x, b, units.own, scales);
      }
    }
  });
}

inline void put_tile(const Context& c, Range batch, Range rows, const __m512* sums) {
  for (int64_t b = batch.first; b < batch.last; ++b, sums += tile_height) {
    float totals[tile_height];
    for (int64_t r = 0; r < tile_height; r += 8) {
      _mm256_storeu_ps(totals + r, sum_eight(sums + r));
    }
    for (int64_t r = rows.first; r < rows.last; ++r)
      put(c, b, r, totals[r - rows.first]);
  }
}

template <class Source, int64_t digits>
void multiply_many(const Context& c, Range batch, Range rows, TileSpace& space) {
  constexpr int64_t block = block_vectors / Source::vectors;
  Source sources[tile_height];
  open_tile(c, batch, rows, space, sources);
  for (int64_t step = 0; step < c.layout.steps; step += block) {
    const Range steps = {step, smaller(step + block, c.layout.steps)};
    fill_tile(c, sources, space, steps);
    multiply_tile<Source::vectors, digits>(c, batch, space, steps);
  }
  put_tile(c, batch, rows, space.sums);
}

// ---- The source of a matrix ----

// Calls `use(source, digits)` with values of the types that a product needs.
template <class Source, class Use>
void with_digits(int64_t digits, Use use) {
  if (digits == 1) return use(Source(), Count<1>());
  use(Source(), Count<2>());
}

template <int bits, class Use>
void with_bits(const halve_quantized& w, int64_t digits, Use use) {
  const bool two = step_vectors(w) == 2;
  if (w.mask != nullptr) {
    return two ? with_digits<MaskedCodes<bits, 2>>(digits, use)
               : with_digits<MaskedCodes<bits, 1>>(digits, use);
  }
  if constexpr (bits == 2 || bits == 4) {
    with_digits<InterleavedCodes<bits>>(digits, use);
  } else {
    two ? with_digits<DenseCodes<bits, 2>>(digits, use)
        : with_digits<DenseCodes<bits, 1>>(digits, use);
  }
}

template <class Use>
void with_source(const halve_quantized& w, int64_t digits, Use use) {
  if (w.bits == 2) return with_bits<2>(w, digits, use);
  if (w.bits == 3) return with_bits<3>(w, digits, use);
  if (w.bits == 4) return with_bits<4>(w, digits, use);
  with_bits<8>(w, digits, use);
}

// ---- Workspaces ----
// Of a row: scales for `count` vectors and alone, zeros and a spare row; whole lines
// each.

int64_t row_bytes(const halve_quantized& w, const Layout& layout, int64_t count) {
  return (count + 2) * layout.units * int64_t{sizeof(float)} +
         round_up(readable_bytes(w), word_columns);
}

RowSpace row_space(const Context& c, int64_t count, uint8_t* at) {
  auto* scales = reinterpret_cast<float*>(at);
  float* own = scales + count * c.layout.units;
  auto* zeros = reinterpret_cast<uint32_t*>(own + c.layout.units);
  return {{scales, own, zeros}, reinterpret_cast<uint8_t*>(zeros + c.layout.units)};
}

constexpr int64_t tile_code_bytes = block_vectors * tile_height * word_columns;

int64_t tile_bytes(const halve_quantized& w, const Layout& layout, int64_t count) {
  const int64_t sum_bytes = count * tile_height * int64_t{sizeof(__m512)};
  return tile_code_bytes + sum_bytes + tile_height * row_bytes(w, layout, count);
}

TileSpace tile_space(const Context& c, int64_t count, uint8_t* at) {
  TileSpace space;
  space.codes = at;
  space.sums = reinterpret_cast<__m512*>(at + tile_code_bytes);
  at = reinterpret_cast<uint8_t*>(space.sums + count * tile_height);
  for (TileRow& row : space.rows) {
    row = {row_space(c, count, at), nullptr, 0};
    at += row_bytes(c.w, c.layout, count);
  }
  return space;
}

// ---- The functions of a kernel ----

double arranged_bytes(const halve_quantized& w, Precision precision, int64_t batch) {
  return double(Layout(w, precision).chunk_bytes(1)) * batch;
}

double workspace_bytes(const halve_quantized& w, Precision precision, int64_t batch) {
  const Layout layout(w, precision);
  if (batch <= few_vectors) return double(row_bytes(w, layout, batch));
  return double(tile_bytes(w, layout, smaller(batch, tile_vectors)));
}

void arrange(const halve_quantized& w, Precision precision, const void* x,
             int64_t batch, void* arranged) {
  const Layout layout(w, precision);
  auto* chunk = static_cast<uint8_t*>(arranged);
  for (int64_t b = 0; b < batch; b += most_vectors) {
    const int64_t count = smaller(most_vectors, batch - b);
    write_chunk(w, precision, x, b * w.columns, count, chunk);
    chunk += layout.chunk_bytes(count);
  }
}

void product_of_few(const Context& c, Range rows, uint8_t* workspace) {
  const RowSpace space = row_space(c, c.o.batch, workspace);
  with_source(c.w, c.layout.digits, [&](auto source, auto digits) {
    with_count<few_vectors>(c.o.batch, [&](auto count) {
      multiply_few<decltype(source), digits.value, count.value>(c, rows, space);
    });
  });
}

void product_of_many(const Context& c, Range rows, uint8_t* workspace) {
  for (int64_t b = 0; b < c.o.batch; b += tile_vectors) {
    const Range batch = {b, smaller(b + tile_vectors, c.o.batch)};
    TileSpace space = tile_space(c, smaller(c.o.batch, tile_vectors), workspace);
    with_source(c.w, c.layout.digits, [&](auto source, auto digits) {
      for (int64_t row = rows.first; row < rows.last; row += tile_height) {
        const Range tile = {row, smaller(row + tile_height, rows.last)};
        multiply_many<decltype(source), digits.value>(c, batch, tile, space);
      }
    });
  }
}

void product(const halve_quantized& w, Precision precision, const Operands& o,
             Range rows, void* workspace) {
  const Context context(w, precision, o);
  auto* space = static_cast<uint8_t*>(workspace);
  if (o.batch <= few_vectors) return product_of_few(context, rows, space);
  product_of_many(context, rows, space);
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
