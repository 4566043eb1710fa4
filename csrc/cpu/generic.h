// The algorithms of the kernels, as templates over the lanes of an instruction set.
// They contain no intrinsics, threads, allocation or argument checks.
//
// Everything is in an anonymous namespace. An ordinary inline function exists once in a
// program, so the linker could keep the copy that was compiled for AVX-512, and a CPU
// without AVX-512 would execute it. For the same reason these files include as little
// as possible.
//
// `L`, the lanes of an instruction set and a dtype, provides
//   Stored                   the type of a weight in memory, as bits
//   Element                  the type of an arranged x and of an expanded weight
//   Vector, Sum              registers of `width` Elements, and of partial sums
//   width                    columns in a Vector: a divisor of 64
//   few                      the largest batch that is multiplied without a tile
//   batch_tile               vectors of x whose sums with four rows fit the registers
//   zero, load, store, dot(sum, a, b), add(sum, sum), total(sum)
//   totals(sums, out)        the totals of tile_rows sums
//   widen(stored)            loads `width` weights as a Vector
//   expand(stored, bits)     the next weights where `bits` has ones, zeros elsewhere
//   copy(out, stored, bits)  writes the same to memory, as bits
//   to_float(stored)         converts one number
//   from_float(float)        converts one number, rounded to nearest, ties to even

#ifndef HALVE_GENERIC_H
#define HALVE_GENERIC_H

#include "kernel.h"
#include "packed.h"

#if defined(__clang__)
#define HALVE_UNROLL _Pragma("unroll")
#else
#define HALVE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

using halve::Dense;
using halve::Kernel;
using halve::Operands;
using halve::Range;
using halve::tile_rows;

// Rows of a register tile.
constexpr int64_t quad = 4;
static_assert(tile_rows % quad == 0);

// Words of each row that are expanded before they are multiplied: so few that a block
// of the tile and the matching block of x stay in the L1 cache.
constexpr int64_t block_words = 8;

// Prefetch distances in bytes. The hardware prefetcher does not predict loads whose
// addresses depend on popcounts: without software prefetches the packed product loses a
// tenth of its speed with one vector and half with four. At 45 GB/s, 2 to 8 KB ahead
// perform equally; at 65 GB/s, 4 KB costs a tenth (docs/log.md).
constexpr int64_t values_ahead = 8192;
constexpr int64_t mask_ahead = 1024;
constexpr int64_t line = 64;

// Prefetching an address past the end of an array is harmless.
inline void prefetch(const void* from, int64_t ahead) {
  __builtin_prefetch(static_cast<const char*>(from) + ahead, 0, 3);
}

// The values of a word take one cache line on average. Where they take more, a single
// prefetch for each word would miss every twentieth line; where they take less, the
// second prefetch is free.
inline void prefetch_values(const void* from) {
  prefetch(from, values_ahead);
  prefetch(from, values_ahead + line);
}

template <int64_t n>
struct Count {
  static constexpr int64_t value = n;
};

// Calls `use(Count<n>())` with n = count, which is in [1, max]: turns a run-time count
// into a compile-time constant.
template <int64_t max, class Use>
inline void with_count(int64_t count, Use use) {
  if constexpr (max > 0) {
    if (count == max) return use(Count<max>());
    with_count<max - 1>(count, use);
  }
}

template <class L>
constexpr int64_t vectors_per_word = word_columns / L::width;

template <class L>
inline int64_t kept_in(uint64_t bits) {
  return __builtin_popcountll(bits & ((uint64_t{1} << L::width) - 1));
}

// Calls `use(vector index, values, bits)` for each vector of a row's next word, and
// returns a pointer to the values after it.
template <class L, class Use>
inline const typename L::Stored* walk_word(const typename L::Stored* values,
                                           uint64_t bits, Use use) {
  HALVE_UNROLL
  for (int64_t i = 0; i < vectors_per_word<L>; ++i) {
    use(i, values, bits);
    values += kept_in<L>(bits);
    bits >>= L::width;
  }
  return values;
}

// Loads columns [first, first + width) of a dense row; columns past its end are zeros.
template <class L>
inline typename L::Vector load_columns(const typename L::Stored* row, int64_t columns,
                                       int64_t first) {
  if (first + L::width <= columns) return L::widen(row + first);
  typename L::Stored padded[L::width] = {};
  if (first < columns) {
    std::memcpy(padded, row + first, (columns - first) * sizeof(*row));
  }
  return L::widen(padded);
}

// ---- Arranging x ----
// x is stored as [groups][columns / width][vectors of the group][width], the order in
// which the register tile reads it. In its original order, rows of x that are a power
// of two apart would map to the same sets of the L1 cache.

// From this many vectors on, sums stay in registers from the first column to the last:
// see "Panels". With fewer all vectors are one group here.
constexpr int64_t panel_batch = 24;

// With few registers each group is small, and would load all weights from the L2 cache.
template <class L>
inline bool by_panels(int64_t batch) {
  return L::batch_tile >= quad && batch >= panel_batch;
}

// The number of groups of vectors whose sums with four rows fit the registers. They are
// as equal as possible: a last group of one vector would load all weights for a
// fraction of the work.
template <class L>
inline int64_t groups_of(int64_t batch) {
  return (batch + L::batch_tile - 1) / L::batch_tile;
}

// The vectors of group g.
inline Range group_range(int64_t batch, int64_t groups, int64_t g) {
  return {batch * g / groups, batch * (g + 1) / groups};
}

template <class L>
double arranged_bytes(int64_t batch, int64_t columns) {
  return double(words_of(columns)) * word_columns * batch * sizeof(typename L::Element);
}

template <class L>
void arrange(const void* x, int64_t batch, int64_t columns, void* arranged) {
  const auto* rows = static_cast<const typename L::Stored*>(x);
  auto* out = static_cast<typename L::Element*>(arranged);
  const int64_t padded = words_of(columns) * word_columns;
  const int64_t groups = by_panels<L>(batch) ? groups_of<L>(batch) : 1;
  for (int64_t g = 0; g < groups; ++g) {
    const Range group = group_range(batch, groups, g);
    for (int64_t first = 0; first < padded; first += L::width) {
      for (int64_t b = group.first; b < group.last; ++b, out += L::width) {
        L::store(out, load_columns<L>(rows + b * columns, columns, first));
      }
    }
  }
}

// ---- Results ----

template <class L>
inline void put(const Operands& o, int64_t rows, int64_t b, int64_t row, float sum) {
  using Stored = typename L::Stored;
  const float bias = o.bias ? L::to_float(read<Stored>(o.bias, row)) : 0.0f;
  const Stored rounded = L::from_float(sum + bias);
  std::memcpy(static_cast<Stored*>(o.y) + b * rows + row, &rounded, sizeof(rounded));
}

// Writes the sums of all rows of a tile with one vector. The loops have a constant
// length, so that they become a few vector instructions.
template <class L>
inline void put_tile(const Operands& o, int64_t rows, int64_t b, int64_t row,
                     const float* sums) {
  using Stored = typename L::Stored;
  Stored bias[tile_rows] = {}, rounded[tile_rows];
  if (o.bias) std::memcpy(bias, static_cast<const Stored*>(o.bias) + row, sizeof(bias));
  for (int64_t r = 0; r < tile_rows; ++r) {
    rounded[r] = L::from_float(sums[r] + L::to_float(bias[r]));
  }
  std::memcpy(static_cast<Stored*>(o.y) + b * rows + row, rounded, sizeof(rounded));
}

// ---- A few vectors ----

// Each multiply-add waits for the previous one into the same sum, so a row has several
// sums.
template <int64_t count>
constexpr int64_t chains = count == 1 ? 4 : 2;

template <class L, int64_t count>
struct RowSums {
  typename L::Sum sums[chains<count>][count];

  RowSums() {
    for (auto& chain : sums) {
      for (auto& sum : chain) sum = L::zero();
    }
  }

  // Adds the products of the columns in `w` with the same columns of every vector of x.
  void add(int64_t chain, typename L::Vector w, const typename L::Element* x) {
    HALVE_UNROLL
    for (int64_t b = 0; b < count; ++b) {
      typename L::Sum& sum = sums[chain % chains<count>][b];
      sum = L::dot(sum, w, L::load(x + b * L::width));
    }
  }

  float total(int64_t b) const {
    typename L::Sum all = sums[0][b];
    for (int64_t i = 1; i < chains<count>; ++i) all = L::add(all, sums[i][b]);
    return L::total(all);
  }
};

// Multiplies one row at a time: one stream of values and one of masks, which can be
// prefetched. Several rows at once measured slower. With more than a few vectors x no
// longer fits into the L1 cache, so several rows must use each part of it: see below.
template <class L, int64_t count>
inline RowSums<L, count> packed_row(const typename L::Stored* values,
                                    const unsigned char* mask, int64_t words,
                                    const typename L::Element* x) {
  constexpr int64_t per_word = vectors_per_word<L>;
  constexpr int64_t step = chains<count> > per_word ? chains<count> / per_word : 1;
  RowSums<L, count> sums;
  const auto add_word = [&](int64_t k, int64_t chain) {
    prefetch_values(values);
    if (k % 8 == 0) prefetch(mask, 8 * k + mask_ahead);
    const auto* part = x + k * word_columns * count;
    values = walk_word<L>(values, read<uint64_t>(mask, k),
                          [&](int64_t i, const auto* next, uint64_t bits) {
                            const auto* columns = part + i * L::width * count;
                            sums.add(chain + i, L::expand(next, bits), columns);
                          });
  };
  int64_t k = 0;
  for (; k + step <= words; k += step) {
    HALVE_UNROLL
    for (int64_t i = 0; i < step; ++i) add_word(k + i, i * per_word);
  }
  for (; k < words; ++k) add_word(k, 0);
  return sums;
}

template <class L, int64_t count>
void packed_rows(const halve_packed& w, const Operands& o, Range rows,
                 void* workspace) {
  auto* spare = static_cast<typename L::Stored*>(workspace);
  const auto* x = static_cast<const typename L::Element*>(o.x);
  const int64_t words = words_of(w.columns);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const auto* values = values_of(w, row, spare);
    const auto sums = packed_row<L, count>(values, mask_of(w, row), words, x);
    for (int64_t b = 0; b < count; ++b) put<L>(o, w.rows, b, row, sums.total(b));
  }
}

// Multiplies `height` rows at once, so that each part of x is loaded once for all of
// them. The hardware prefetcher follows these streams without help.
template <class L, int64_t count, int64_t height>
inline void dense_some(const Dense& w, const Operands& o, int64_t row) {
  const auto* weight =
      static_cast<const typename L::Stored*>(w.weight) + row * w.columns;
  const auto* x = static_cast<const typename L::Element*>(o.x);
  typename L::Sum sums[height][count];
  for (auto& of_row : sums) {
    for (auto& sum : of_row) sum = L::zero();
  }
  const auto add = [&](int64_t first, auto load) {
    HALVE_UNROLL
    for (int64_t r = 0; r < height; ++r) {
      const auto part = load(weight + r * w.columns);
      HALVE_UNROLL
      for (int64_t b = 0; b < count; ++b) {
        const auto* columns = x + first * count + b * L::width;
        sums[r][b] = L::dot(sums[r][b], part, L::load(columns));
      }
    }
  };
  int64_t first = 0;
  for (; first + L::width <= w.columns; first += L::width) {
    add(first, [&](const auto* from) { return L::widen(from + first); });
  }
  if (first < w.columns) {
    add(first,
        [&](const auto* from) { return load_columns<L>(from, w.columns, first); });
  }
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t b = 0; b < count; ++b) {
      put<L>(o, w.rows, b, row + r, L::total(sums[r][b]));
    }
  }
}

template <class L, int64_t count>
void dense_rows(const Dense& w, const Operands& o, Range rows) {
  constexpr int64_t height = count <= 2 ? 4 : 2;
  int64_t row = rows.first;
  for (; row + height <= rows.last; row += height) {
    dense_some<L, count, height>(w, o, row);
  }
  for (; row < rows.last; ++row) dense_some<L, count, 1>(w, o, row);
}

// ---- Many vectors ----
// Rows are expanded, a block of columns at a time, into a tile in the cache, and the
// tile is multiplied with every vector of the batch. A source of rows provides
//   open(slot, row)            begins a row
//   fill(slot, words, out, step)
//                              writes its next columns, vectors `step` elements apart

template <class L>
class PackedRows {
 public:
  using Stored = typename L::Stored;

  PackedRows(const halve_packed& w, Stored* spare) : w_(w), spare_(spare) {}

  void open(int64_t slot, int64_t row) {
    Stored* spare = spare_ + slot * words_of(w_.columns) * word_columns;
    const int64_t later = smaller(row + tile_rows, w_.rows - 1);
    ahead_[slot] = (begin_of(w_, later) - begin_of(w_, row)) * int64_t{sizeof(Stored)};
    values_[slot] = values_of(w_, row, spare);
    mask_[slot] = mask_of(w_, row);
  }

  void fill(int64_t slot, int64_t words, typename L::Element* out, int64_t step) {
    const Stored* values = values_[slot];
    const int64_t masks_ahead = mask_of(w_, tile_rows) - mask_of(w_, 0);
    for (int64_t k = 0; k < words; ++k) {
      prefetch(values, ahead_[slot]);
      if (k % 8 == 0) prefetch(mask_[slot], 8 * k + masks_ahead);
      values = walk_word<L>(values, read<uint64_t>(mask_[slot], k),
                            [&](int64_t, const Stored* next, uint64_t bits) {
                              L::store(out, L::expand(next, bits));
                              out += step;
                            });
    }
    values_[slot] = values;
    mask_[slot] += words * sizeof(uint64_t);
  }

 private:
  const halve_packed& w_;
  Stored* spare_;
  const Stored* values_[tile_rows];
  // Bytes from a row's values to those of the same slot's row in the next tile.
  int64_t ahead_[tile_rows];
  const unsigned char* mask_[tile_rows];
};

template <class L>
class DenseRows {
 public:
  using Stored = typename L::Stored;

  explicit DenseRows(const Dense& w) : w_(w) {}

  void open(int64_t slot, int64_t row) {
    row_[slot] = static_cast<const Stored*>(w_.weight) + row * w_.columns;
    column_[slot] = 0;
  }

  void fill(int64_t slot, int64_t words, typename L::Element* out, int64_t step) {
    const int64_t end = column_[slot] + words * word_columns;
    const int64_t ahead = tile_rows * w_.columns * sizeof(Stored);
    for (int64_t& c = column_[slot]; c < end; c += L::width) {
      prefetch(row_[slot] + c, ahead);
      L::store(out, load_columns<L>(row_[slot], w_.columns, c));
      out += step;
    }
  }

 private:
  const Dense& w_;
  const Stored* row_[tile_rows];
  int64_t column_[tile_rows];
};

// Opens the rows of a tile. A short last tile repeats its last row, so that there is no
// second loop for it.
template <class Source>
void open_tile(Source& source, int64_t row, int64_t last) {
  const int64_t count = smaller(tile_rows, last - row);
  for (int64_t r = 0; r < tile_rows; ++r) source.open(r, row + smaller(r, count - 1));
}

// Where the vectors of a tile lie, in elements.
struct Strides {
  int64_t row, vector;
};

// Adds the products of four rows with `count` vectors to `sums`, [count][tile_rows], or
// writes them there if it begins a row.
template <class L, int64_t count, bool begins = false>
void multiply(const typename L::Element* tile, Strides strides,
              const typename L::Element* x, int64_t batch, int64_t vectors,
              typename L::Sum* sums) {
  typename L::Sum held[count][quad];
  HALVE_UNROLL
  for (int64_t b = 0; b < count; ++b) {
    HALVE_UNROLL
    for (int64_t r = 0; r < quad; ++r) {
      held[b][r] = begins ? L::zero() : sums[b * tile_rows + r];
    }
  }
  for (int64_t k = 0; k < vectors; ++k) {
    typename L::Vector w[quad];
    HALVE_UNROLL
    for (int64_t r = 0; r < quad; ++r) w[r] = L::load(tile + r * strides.row);
    HALVE_UNROLL
    for (int64_t b = 0; b < count; ++b) {
      const auto part = L::load(x + b * L::width);
      HALVE_UNROLL
      for (int64_t r = 0; r < quad; ++r) held[b][r] = L::dot(held[b][r], w[r], part);
    }
    tile += strides.vector;
    x += batch * L::width;
  }
  HALVE_UNROLL
  for (int64_t b = 0; b < count; ++b) {
    HALVE_UNROLL
    for (int64_t r = 0; r < quad; ++r) sums[b * tile_rows + r] = held[b][r];
  }
}

// Multiplies a block of the tile with the whole batch, group by group.
template <class L>
void multiply_block(const typename L::Element* tile, const typename L::Element* x,
                    int64_t batch, int64_t vectors, typename L::Sum* sums) {
  const int64_t groups = groups_of<L>(batch);
  for (int64_t g = 0; g < groups; ++g) {
    const Range group = group_range(batch, groups, g);
    const int64_t b = group.first;
    with_count<L::batch_tile>(group.last - b, [&](auto n) {
      for (int64_t r = 0; r < tile_rows; r += quad) {
        multiply<L, n.value>(tile + r * L::width, {L::width, tile_rows * L::width},
                             x + b * L::width, batch, vectors,
                             sums + b * tile_rows + r);
      }
    });
  }
}

// ---- Panels ----
// With many vectors, their blocks and sums no longer fit into the L1 cache, and would
// be loaded from the L2 cache for every block of the tile. Then whole rows are
// expanded, as many as fit into half of a small L2 cache, and each group of vectors is
// multiplied with all of them, its sums in registers from the first column to the last.
// The products of a row are added in the same order as in blocks, to the same bits.

constexpr int64_t panel_bytes = 256 << 10;

// Elements from one row of a panel to the next: a vector more than it has, so that rows
// of a power of two do not map to the same sets of the L1 cache.
template <class L>
inline int64_t panel_row(int64_t columns) {
  return words_of(columns) * word_columns + L::width;
}

// Rows of a panel, a multiple of tile_rows.
template <class L>
inline int64_t panel_rows(int64_t columns) {
  const int64_t row_bytes = panel_row<L>(columns) * sizeof(typename L::Element);
  const int64_t tiles = panel_bytes / (row_bytes * tile_rows);
  return (tiles > 1 ? tiles : 1) * tile_rows;
}

// Multiplies the rows of one tile, expanded whole, with the vectors of one group.
template <class L, int64_t count>
void multiply_rows(const typename L::Element* tile, int64_t row_size,
                   const typename L::Element* x, int64_t vectors,
                   typename L::Sum* sums) {
  for (int64_t r = 0; r < tile_rows; r += quad) {
    multiply<L, count, true>(tile + r * row_size, {row_size, L::width}, x, count,
                             vectors, sums + r);
  }
}

// Writes the totals of the first `rows` rows of a tile with some vectors.
template <class L>
void put_totals(const typename L::Sum* sums, const Operands& o, int64_t all_rows,
                Range vectors, int64_t row, int64_t rows) {
  for (int64_t b = vectors.first; b < vectors.last; ++b, sums += tile_rows) {
    float totals[tile_rows];
    L::totals(sums, totals);
    if (rows == tile_rows) {
      put_tile<L>(o, all_rows, b, row, totals);
    } else {
      for (int64_t r = 0; r < rows; ++r) put<L>(o, all_rows, b, row + r, totals[r]);
    }
  }
}

template <class L, class Source>
void panel_product(Source& source, const Operands& o, int64_t all_rows, int64_t columns,
                   Range rows, void* workspace) {
  const int64_t words = words_of(columns), vectors = words * vectors_per_word<L>;
  const int64_t row_size = panel_row<L>(columns), tile_size = tile_rows * row_size;
  const int64_t height = panel_rows<L>(columns), groups = groups_of<L>(o.batch);
  auto* panel = static_cast<typename L::Element*>(workspace);
  auto* sums = reinterpret_cast<typename L::Sum*>(panel + height * row_size);
  for (int64_t first = rows.first; first < rows.last; first += height) {
    const int64_t last = smaller(first + height, rows.last);
    auto* tile = panel;
    for (int64_t row = first; row < last; row += tile_rows, tile += tile_size) {
      open_tile(source, row, last);
      for (int64_t r = 0; r < tile_rows; ++r) {
        source.fill(r, words, tile + r * row_size, L::width);
      }
    }
    const auto* x = static_cast<const typename L::Element*>(o.x);
    for (int64_t g = 0; g < groups; ++g) {
      const Range group = group_range(o.batch, groups, g);
      tile = panel;
      for (int64_t row = first; row < last; row += tile_rows, tile += tile_size) {
        with_count<L::batch_tile>(group.last - group.first, [&](auto n) {
          multiply_rows<L, n.value>(tile, row_size, x, vectors, sums);
        });
        put_totals<L>(sums, o, all_rows, group, row, smaller(tile_rows, last - row));
      }
      x += (group.last - group.first) * vectors * L::width;
    }
  }
}

// ---- Blocks ----

template <class L>
double tile_bytes(int64_t batch, int64_t columns) {
  using Element = typename L::Element;
  const bool panels = by_panels<L>(batch);
  const double panel = double(panel_rows<L>(columns)) * panel_row<L>(columns);
  const double block = double(tile_rows) * block_words * word_columns;
  const double elements = panels ? panel : block;
  const double sums = double(tile_rows) * (panels ? L::batch_tile : batch);
  return elements * sizeof(Element) + sums * sizeof(typename L::Sum);
}

// Computes the sums of the tile_rows rows that are open in `source` with the whole
// batch.
template <class L, class Source>
void sum_tile(Source& source, const Operands& o, int64_t columns,
              typename L::Element* tile, typename L::Sum* sums) {
  const auto* x = static_cast<const typename L::Element*>(o.x);
  for (int64_t i = 0; i < tile_rows * o.batch; ++i) sums[i] = L::zero();
  const int64_t words = words_of(columns);
  for (int64_t k = 0; k < words; k += block_words) {
    const int64_t count = smaller(block_words, words - k);
    for (int64_t r = 0; r < tile_rows; ++r) {
      source.fill(r, count, tile + r * L::width, tile_rows * L::width);
    }
    multiply_block<L>(tile, x + k * word_columns * o.batch, o.batch,
                      count * vectors_per_word<L>, sums);
  }
}

template <class L, class Source>
void batch_product(Source& source, const Operands& o, int64_t all_rows, int64_t columns,
                   Range rows, void* workspace) {
  auto* tile = static_cast<typename L::Element*>(workspace);
  auto* sums =
      reinterpret_cast<typename L::Sum*>(tile + tile_rows * block_words * word_columns);
  for (int64_t row = rows.first; row < rows.last; row += tile_rows) {
    open_tile(source, row, rows.last);
    sum_tile<L>(source, o, columns, tile, sums);
    const int64_t count = smaller(tile_rows, rows.last - row);
    put_totals<L>(sums, o, all_rows, {0, o.batch}, row, count);
  }
}

// Multiplies by panels or by blocks.
template <class L, class Source>
void many_product(Source& source, const Operands& o, int64_t all_rows, int64_t columns,
                  Range rows, void* workspace) {
  if (by_panels<L>(o.batch)) {
    panel_product<L>(source, o, all_rows, columns, rows, workspace);
  } else {
    batch_product<L>(source, o, all_rows, columns, rows, workspace);
  }
}

// ---- The functions of a kernel ----

// A small batch needs one spare row; a larger one a tile, its sums, and tile_rows spare
// rows.
template <class L>
double workspace_bytes(int64_t batch, int64_t columns) {
  const double spare =
      double(words_of(columns)) * word_columns * sizeof(typename L::Stored);
  return batch <= L::few ? spare : tile_bytes<L>(batch, columns) + tile_rows * spare;
}

template <class L>
void packed(const halve_packed& w, const Operands& o, Range rows, void* workspace) {
  if (o.batch <= L::few) {
    return with_count<L::few>(o.batch, [&](auto count) {
      packed_rows<L, count.value>(w, o, rows, workspace);
    });
  }
  const int64_t tile = tile_bytes<L>(o.batch, w.columns);
  char* spare = static_cast<char*>(workspace) + tile;
  PackedRows<L> source(w, reinterpret_cast<typename L::Stored*>(spare));
  many_product<L>(source, o, w.rows, w.columns, rows, workspace);
}

template <class L>
void dense(const Dense& w, const Operands& o, Range rows, void* workspace) {
  if (o.batch <= L::few) {
    return with_count<L::few>(
        o.batch, [&](auto count) { dense_rows<L, count.value>(w, o, rows); });
  }
  DenseRows<L> source(w);
  many_product<L>(source, o, w.rows, w.columns, rows, workspace);
}

template <class L>
inline const typename L::Stored* unpack_word(const typename L::Stored* values,
                                             uint64_t bits, typename L::Stored* out) {
  return walk_word<L>(values, bits, [&](int64_t i, const auto* next, uint64_t some) {
    L::copy(out + i * L::width, next, some);
  });
}

template <class L>
void unpack_row(const typename L::Stored* values, const unsigned char* mask,
                int64_t columns, typename L::Stored* out) {
  const int64_t whole = columns / word_columns, rest = columns % word_columns;
  for (int64_t k = 0; k < whole; ++k, out += word_columns) {
    prefetch_values(values);
    if (k % 8 == 0) prefetch(mask, 8 * k + mask_ahead);
    values = unpack_word<L>(values, read<uint64_t>(mask, k), out);
  }
  if (rest == 0) return;
  typename L::Stored last[word_columns];
  unpack_word<L>(values, read<uint64_t>(mask, whole), last);
  std::memcpy(out, last, rest * sizeof(*out));
}

template <class L>
void unpack(const halve_packed& w, Range rows, void* out, void* workspace) {
  using Stored = typename L::Stored;
  auto* dense = static_cast<Stored*>(out);
  auto* spare = static_cast<Stored*>(workspace);
  for (int64_t row = rows.first; row < rows.last; ++row, dense += w.columns) {
    unpack_row<L>(values_of(w, row, spare), mask_of(w, row), w.columns, dense);
  }
}

template <class L>
constexpr Kernel kernel_of = {arranged_bytes<L>, workspace_bytes<L>, arrange<L>,
                              packed<L>,         dense<L>,           unpack<L>};

}  // namespace

#endif
