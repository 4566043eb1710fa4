// The reference kernel for integer codes, which defines the result: activations become
// integers as in quantized.h; sums in double; one rounding at the end. The tests
// compare every other kernel with it.

#include "quantized.h"
#include "reference_dtypes.h"

namespace halve {
namespace {

// Calls `use(dtype)` with the type that converts numbers of a dtype.
template <class Use>
void with_dtype(int32_t dtype, Use use) {
  if (dtype == HALVE_F32) return use(Float32());
  if (dtype == HALVE_F16) return use(Float16());
  use(Bfloat16());
}

double arranged_bytes(const halve_quantized& w, Precision, int64_t batch) {
  return double(batch) * w.columns * sizeof(double);
}

// A row of weights, and a row of codes.
double workspace_bytes(const halve_quantized& w, Precision, int64_t) {
  return double(w.columns) * sizeof(double) + readable_bytes(w);
}

void quantize_unit(const float* x, int64_t count, float limit, double* out) {
  int16_t integers[widest_unit];
  const double scale = quantize(x, count, limit, integers);
  for (int64_t i = 0; i < count; ++i) out[i] = integers[i] * scale;
}

template <class Dtype>
void arrange_vector(const halve_quantized& w, const void* x, int64_t index, float limit,
                    double* out) {
  const int64_t unit = unit_of(w);
  float numbers[widest_unit];
  for (int64_t first = 0; first < w.columns; first += unit) {
    const int64_t count = smaller(unit, w.columns - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = index * w.columns + first + i;
      numbers[i] = float(Dtype::decode(read<typename Dtype::Stored>(x, at)));
    }
    quantize_unit(numbers, count, limit, out + first);
  }
}

void arrange(const halve_quantized& w, Precision precision, const void* x,
             int64_t batch, void* arranged) {
  auto* out = static_cast<double*>(arranged);
  const float limit = largest_integer(precision.activations);
  with_dtype(precision.dtype, [&](auto dtype) {
    for (int64_t b = 0; b < batch; ++b) {
      arrange_vector<decltype(dtype)>(w, x, b, limit, out + b * w.columns);
    }
  });
}

bool has_code(const halve_quantized& w, int64_t row, int64_t column) {
  if (w.mask == nullptr) return true;
  return mask_of(w, row)[column / 8] >> (column % 8) & 1;
}

// The product is exact. The code of zero is 0, never -0, whatever the scale is.
double weight_of(const halve_quantized& w, int64_t row, int64_t column, int32_t code) {
  const int64_t group = column / group_of(w);
  const double steps = code - zero_at(w, row, group);
  return steps == 0 ? 0 : steps * Float16::decode(scale_at(w, row, group));
}

// Calls `put(column, weight)` for every column of a row; a weight without a code is 0.
template <class Put>
void walk_row(const halve_quantized& w, int64_t row, uint8_t* spare, Put put) {
  const uint8_t* codes = codes_of(w, row, spare);
  int64_t next = 0;
  for (int64_t column = 0; column < w.columns; ++column) {
    const bool coded = has_code(w, row, column);
    const int32_t code = coded ? code_at(codes, next, w.bits) : 0;
    put(column, coded ? weight_of(w, row, column, code) : 0.0);
    next += coded;
  }
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

void product(const halve_quantized& w, Precision precision, const Operands& o,
             Range rows, void* workspace) {
  auto* weight = static_cast<double*>(workspace);
  auto* spare = reinterpret_cast<uint8_t*>(weight + w.columns);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    walk_row(w, row, spare,
             [&](int64_t column, double value) { weight[column] = value; });
    with_dtype(precision.dtype, [&](auto dtype) {
      put_row<decltype(dtype)>(weight, o, w.rows, w.columns, row);
    });
  }
}

template <class Dtype>
void unpack_rows(const halve_quantized& w, Range rows, void* out, void* workspace) {
  using Stored = typename Dtype::Stored;
  auto* dense = static_cast<Stored*>(out);
  for (int64_t row = rows.first; row < rows.last; ++row, dense += w.columns) {
    walk_row(w, row, static_cast<uint8_t*>(workspace),
             [&](int64_t column, double value) {
               const Stored rounded = Dtype::encode(value);
               std::memcpy(dense + column, &rounded, sizeof(rounded));
             });
  }
}

void unpack(const halve_quantized& w, int32_t dtype, Range rows, void* out,
            void* workspace) {
  with_dtype(dtype,
             [&](auto type) { unpack_rows<decltype(type)>(w, rows, out, workspace); });
}

}  // namespace

const QuantizedKernel reference_quantized_kernel = {arranged_bytes, workspace_bytes,
                                                    arrange, product, unpack};

}  // namespace halve
