// The reference kernel, which defines the result: sums in double, one rounding at the
// end, portable C++ without optimizations. The tests compare every other kernel with
// it.

#include "kernel.h"
#include "packed.h"
#include "reference_dtypes.h"

namespace halve {
namespace {

double arranged_bytes(int64_t batch, int64_t columns) {
  return double(batch) * columns * sizeof(double);
}

double workspace_bytes(int64_t, int64_t columns) {
  return double(columns) * sizeof(double);
}

template <class Dtype>
void decode_all(const void* from, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = Dtype::decode(read<typename Dtype::Stored>(from, i));
  }
}

template <class Dtype>
void arrange(const void* x, int64_t batch, int64_t columns, void* arranged) {
  decode_all<Dtype>(x, batch * columns, static_cast<double*>(arranged));
}

double dot(const double* a, const double* b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

template <class Dtype>
void put_row(const double* weight, const Operands& o, int64_t rows, int64_t columns,
             int64_t row) {
  using Stored = typename Dtype::Stored;
  const auto* x = static_cast<const double*>(o.x);
  const double bias = o.bias ? Dtype::decode(read<Stored>(o.bias, row)) : 0;
  for (int64_t b = 0; b < o.batch; ++b) {
    const Stored y = Dtype::encode(dot(weight, x + b * columns, columns) + bias);
    std::memcpy(static_cast<Stored*>(o.y) + b * rows + row, &y, sizeof(y));
  }
}

// Calls `put(column, bits of the weight)` for every column. The bits are zero where the
// weight is pruned and where its value would be past the end of the array.
template <class Stored, class Put>
void walk_row(const halve_packed& w, int64_t row, Put put) {
  int64_t next = begin_of(w, row);
  const unsigned char* mask = mask_of(w, row);
  for (int64_t column = 0; column < w.columns; ++column) {
    const uint64_t word = read<uint64_t>(mask, column / word_columns);
    const bool kept = (word >> (column % word_columns)) & 1;
    put(column, kept && next < w.kept ? read<Stored>(w.values, next) : Stored{0});
    next += kept;
  }
}

template <class Dtype>
void packed(const halve_packed& w, const Operands& o, Range rows, void* workspace) {
  auto* weight = static_cast<double*>(workspace);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    walk_row<typename Dtype::Stored>(w, row, [&](int64_t column, auto bits) {
      weight[column] = Dtype::decode(bits);
    });
    put_row<Dtype>(weight, o, w.rows, w.columns, row);
  }
}

template <class Dtype>
void dense(const Dense& w, const Operands& o, Range rows, void* workspace) {
  auto* weight = static_cast<double*>(workspace);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const auto* stored = static_cast<const typename Dtype::Stored*>(w.weight);
    decode_all<Dtype>(stored + row * w.columns, w.columns, weight);
    put_row<Dtype>(weight, o, w.rows, w.columns, row);
  }
}

template <class Dtype>
void unpack(const halve_packed& w, Range rows, void* out, void*) {
  using Stored = typename Dtype::Stored;
  auto* dense = static_cast<Stored*>(out);
  for (int64_t row = rows.first; row < rows.last; ++row, dense += w.columns) {
    walk_row<Stored>(w, row, [&](int64_t column, Stored bits) {
      std::memcpy(dense + column, &bits, sizeof(bits));
    });
  }
}

template <class Dtype>
constexpr Kernel kernel_of = {arranged_bytes, workspace_bytes, arrange<Dtype>,
                              packed<Dtype>,  dense<Dtype>,    unpack<Dtype>};

}  // namespace

const Kernel reference_kernels[dtype_count] = {kernel_of<Float32>, kernel_of<Float16>,
                                               kernel_of<Bfloat16>};

}  // namespace halve
