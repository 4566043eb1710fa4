// Products with integer codes for instruction sets that cannot expand bytes, as
// templates over the lanes of an instruction set. A row goes through three loops that
// stay in the L1 cache: its codes become bytes; eight bits of the mask choose a shuffle
// that spreads eight of them; the row, now dense, is multiplied with integers of 16
// bits, exactly within a unit. Activations of 8 bits take the same time as those of 16.
//
// In an anonymous namespace for the reason given in generic.h. `L` provides
//   Half                                  conversions of single float16 numbers
//   unpack<bits>(codes, out)              32 codes as bytes
//   double_codes(bytes)                   doubles 32 bytes
//   spread(out, bytes, order, zero)       eight bytes in an order of `spread_table`
//   Integers, no_integers()               partial sums of integers
//   dot(sum, steps, q)                    adds 16 products
//   Steps, steps(bytes, zero)             16 codes less zero
//   Floats, no_floats()                   partial sums of float32
//   scaled(sum, integers, scale)          adds integers times a scale
//   total(floats)
//   put<dtype>(out, bytes, zero, scale)   eight weights as numbers of a dtype

#ifndef HALVE_QUANTIZED_BYTES_H
#define HALVE_QUANTIZED_BYTES_H

#include "generic.h"
#include "quantized.h"

namespace {

// ---- Spreading ----

// Where a weight has no code: the ninth byte of the shuffled ones, which is zero's
// code.
constexpr uint8_t no_code = 8;

// The orders of eight columns, for every byte of a mask.
struct SpreadTable {
  alignas(64) uint8_t order[256][8];
};

constexpr SpreadTable make_spread_table() {
  SpreadTable table{};
  for (int mask = 0; mask < 256; ++mask) {
    uint8_t next = 0;
    for (int column = 0; column < 8; ++column) {
      table.order[mask][column] = (mask >> column) & 1 ? next++ : no_code;
    }
  }
  return table;
}

constexpr SpreadTable spread_table = make_spread_table();

// ---- Arranging x ----

constexpr int64_t dot_width = 16;

// For each vector of the batch: integers, [padded]; scales and half of the sums of the
// integers, [units] each.
struct ByteLayout {
  int64_t unit, units, padded;

  explicit ByteLayout(const halve_quantized& w)
      : unit(unit_of(w)),
        units(ceil_divide(w.columns, unit)),
        padded(round_up(w.columns, widest_unit)) {}

  int64_t vector_bytes() const {
    return padded * int64_t{sizeof(int16_t)} + units * 2 * int64_t{sizeof(float)};
  }
};

struct VectorView {
  const int16_t* integers;
  const float *scales, *half_sums;
};

inline VectorView vector_of(const ByteLayout& layout, const void* arranged, int64_t b) {
  const auto* begin = static_cast<const uint8_t*>(arranged) + b * layout.vector_bytes();
  const auto* integers = reinterpret_cast<const int16_t*>(begin);
  const auto* scales = reinterpret_cast<const float*>(integers + layout.padded);
  return {integers, scales, scales + layout.units};
}

template <class L>
void arrange_vector(const halve_quantized& w, Precision precision, const void* x,
                    int64_t b, void* arranged) {
  const ByteLayout layout(w);
  const VectorView view = vector_of(layout, arranged, b);
  auto* integers = const_cast<int16_t*>(view.integers);
  auto* scales = const_cast<float*>(view.scales);
  auto* half_sums = const_cast<float*>(view.half_sums);
  const float limit = largest_integer(precision.activations);
  float numbers[widest_unit];
  for (int64_t u = 0; u < layout.units; ++u, integers += layout.unit) {
    const int64_t column = u * layout.unit;
    const int64_t count = smaller(layout.unit, w.columns - column);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = b * w.columns + column + i;
      numbers[i] = number_at<typename L::Half>(x, precision.dtype, at);
    }
    scales[u] = quantize(numbers, count, limit, integers);
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += integers[i];
    half_sums[u] = static_cast<float>(sum) / 2;
  }
}

template <class L>
void arrange_bytes(const halve_quantized& w, Precision precision, const void* x,
                   int64_t batch, void* arranged) {
  std::memset(arranged, 0, batch * ByteLayout(w).vector_bytes());
  for (int64_t b = 0; b < batch; ++b) arrange_vector<L>(w, precision, x, b, arranged);
}

// ---- A row as dense bytes ----

// Bytes that a loop may write past the last one.
constexpr int64_t overhang = 64;

struct RowBuffers {
  uint8_t *dense, *coded, *spare;
};

inline RowBuffers buffers_of(const halve_quantized& w, void* workspace) {
  const int64_t bytes = ByteLayout(w).padded + overhang;
  auto* begin = static_cast<uint8_t*>(workspace);
  return {begin, begin + bytes, begin + 2 * bytes};
}

template <class L, int bits>
void unpack_codes(const uint8_t* codes, int64_t count, bool doubled, uint8_t* out) {
  for (int64_t i = 0; i < count; i += 32, codes += 4 * bits, out += 32) {
    prefetch(codes, values_ahead / 2);
    L::template unpack<bits>(codes, out);
    if (doubled) L::double_codes(out);
  }
}

template <class L>
void unpack_codes(int32_t bits, const uint8_t* codes, int64_t count, bool doubled,
                  uint8_t* out) {
  const auto unpack = bits == 2   ? unpack_codes<L, 2>
                      : bits == 3 ? unpack_codes<L, 3>
                      : bits == 4 ? unpack_codes<L, 4>
                                  : unpack_codes<L, 8>;
  unpack(codes, count, doubled, out);
}

inline int64_t codes_in(const uint8_t* mask, int64_t words) {
  int64_t count = 0;
  for (int64_t k = 0; k < words; ++k) {
    count += __builtin_popcountll(read<uint64_t>(mask, k));
  }
  return count;
}

template <class L>
void spread_codes(const halve_quantized& w, int64_t row, const uint8_t* coded,
                  int32_t factor, uint8_t* out) {
  const uint8_t* mask = mask_of(w, row);
  const int64_t bytes = words_of(w.columns) * 8, width = group_of(w);
  for (int64_t first = 0; first < bytes; first += width / 8) {
    // Columns past the last one have the last group.
    const int64_t group = smaller(first * 8, w.columns - 1) / width;
    const auto zero = static_cast<uint8_t>(factor * zero_at(w, row, group));
    const int64_t last = smaller(first + width / 8, bytes);
    for (int64_t i = first; i < last; ++i) {
      L::spread(out + 8 * i, coded, spread_table.order[mask[i]], zero);
      coded += __builtin_popcount(mask[i]);
    }
  }
}

// Writes a row's codes, times `factor` (1 or 2), and that of zero for the weights that
// have none.
template <class L>
void decode_row(const halve_quantized& w, int64_t row, int32_t factor,
                const RowBuffers& buffers) {
  const uint8_t* codes = codes_of(w, row, buffers.spare);
  const bool doubled = factor == 2;
  if (w.mask == nullptr) {
    return unpack_codes<L>(w.bits, codes, w.columns, doubled, buffers.dense);
  }
  const int64_t count = codes_in(mask_of(w, row), words_of(w.columns));
  unpack_codes<L>(w.bits, codes, count, doubled, buffers.coded);
  spread_codes<L>(w, row, buffers.coded, factor, buffers.dense);
}

// ---- Products ----

// Adds the products of one unit with `count` vectors, `apart` integers apart.
template <class L, int64_t count>
inline void dot_unit(const uint8_t* codes, const int16_t* integers, int64_t apart,
                     int64_t unit, int32_t zero, typename L::Integers (&sums)[count]) {
  for (auto& sum : sums) sum = L::no_integers();
  for (int64_t i = 0; i < unit; i += dot_width) {
    const auto steps = L::steps(codes + i, zero);
    HALVE_UNROLL
    for (int64_t b = 0; b < count; ++b) {
      sums[b] = L::dot(sums[b], steps, integers + b * apart + i);
    }
  }
}

// Multiplies a decoded row with `count` vectors from vector `first` on.
template <class L, int64_t count>
void multiply_row(const halve_quantized& w, Precision precision, const Operands& o,
                  int64_t row, int64_t first, const uint8_t* codes) {
  const ByteLayout layout(w);
  const int64_t per_group = group_of(w) / layout.unit;
  const float step = doubles_codes(w) ? 0.5f : 1.0f;
  const VectorView x = vector_of(layout, o.x, first);
  const int64_t apart = layout.vector_bytes() / int64_t{sizeof(int16_t)};
  typename L::Floats sums[count];
  float half_steps[count] = {};
  for (auto& sum : sums) sum = L::no_floats();
  for (int64_t u = 0; u < layout.units; ++u) {
    const int64_t group = u / per_group;
    const float scale = L::Half::to_float(scale_at(w, row, group)) * step;
    typename L::Integers products[count];
    dot_unit<L, count>(codes + u * layout.unit, x.integers + u * layout.unit, apart,
                       layout.unit, integer_zero(w, row, group), products);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t at = b * apart / 2 + u;
      const float both = scale * x.scales[at];
      sums[b] = L::scaled(sums[b], products[b], both);
      if (adds_half_steps(w)) half_steps[b] += both * x.half_sums[at];
    }
  }
  for (int64_t b = 0; b < count; ++b) {
    put_result<typename L::Half>(o, precision.dtype, w.rows, first + b, row,
                                 L::total(sums[b]) + half_steps[b]);
  }
}

// More vectors' sums do not fit the registers.
constexpr int64_t most_vectors = 4;

template <class L>
void multiply_rows(const halve_quantized& w, Precision precision, const Operands& o,
                   Range rows, void* workspace) {
  const RowBuffers buffers = buffers_of(w, workspace);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    decode_row<L>(w, row, doubles_codes(w) ? 2 : 1, buffers);
    for (int64_t b = 0; b < o.batch; b += most_vectors) {
      with_count<most_vectors>(smaller(most_vectors, o.batch - b), [&](auto count) {
        multiply_row<L, count.value>(w, precision, o, row, b, buffers.dense);
      });
    }
  }
}

// ---- Unpacking ----
// Codes and zeros between them count double here, with a mask and without.

template <class L, int32_t dtype>
void put_row(const halve_quantized& w, int64_t row, const uint8_t* codes, char* out) {
  constexpr int64_t size = dtype == HALVE_F32 ? 4 : 2, at_once = 8;
  const int32_t factor = w.midrise ? 2 : 1;
  const int64_t width = group_of(w);
  for (int64_t first = 0; first < w.columns; first += width) {
    const int64_t group = first / width, last = smaller(first + width, w.columns);
    const auto zero = static_cast<int32_t>(factor * zero_at(w, row, group));
    const float scale = L::Half::to_float(scale_at(w, row, group)) / float(factor);
    int64_t i = first;
    for (; i + at_once <= last; i += at_once) {
      L::template put<dtype>(out + i * size, codes + i, zero, scale);
    }
    if (i == last) continue;
    char rest[at_once * size];
    L::template put<dtype>(rest, codes + i, zero, scale);
    std::memcpy(out + i * size, rest, (last - i) * size);
  }
}

template <class L>
void unpack_bytes(const halve_quantized& w, int32_t dtype, Range rows, void* out,
                  void* workspace) {
  const RowBuffers buffers = buffers_of(w, workspace);
  const int64_t row_bytes = w.columns * (dtype == HALVE_F32 ? 4 : 2);
  const auto put = dtype == HALVE_F32   ? put_row<L, HALVE_F32>
                   : dtype == HALVE_F16 ? put_row<L, HALVE_F16>
                                        : put_row<L, HALVE_BF16>;
  auto* to = static_cast<char*>(out);
  for (int64_t row = rows.first; row < rows.last; ++row, to += row_bytes) {
    decode_row<L>(w, row, w.midrise ? 2 : 1, buffers);
    put(w, row, buffers.dense, to);
  }
}

// ---- The functions of a kernel ----

inline double arranged_size(const halve_quantized& w, Precision, int64_t batch) {
  return double(ByteLayout(w).vector_bytes()) * batch;
}

inline double workspace_size(const halve_quantized& w, Precision, int64_t) {
  return 2.0 * (ByteLayout(w).padded + overhang) + readable_bytes(w);
}

template <class L>
constexpr halve::QuantizedKernel quantized_kernel_of = {
    arranged_size, workspace_size, arrange_bytes<L>, multiply_rows<L>, unpack_bytes<L>};

}  // namespace

#endif
