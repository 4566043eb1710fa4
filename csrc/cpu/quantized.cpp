// The entry points for matrices of integer codes; halve.cpp has those for packed and
// dense matrices.

#include "quantized.h"

#include "dispatch.h"
#include "entry.h"
#include "threads.h"

namespace halve {
namespace {

bool is_flag(int32_t value) { return value == 0 || value == 1; }

bool are_bits(int32_t bits) { return (bits >= 2 && bits <= 4) || bits == 8; }

// Zero lies between two codes only on a grid that no zero points move, and whose codes,
// counted in half steps, still take 8 bits.
bool is_midrise(const halve_quantized& w) {
  return w.midrise == 0 || (w.midrise == 1 && w.zeros == nullptr && w.bits <= 4);
}

bool is_group(int64_t group, int64_t columns) {
  return group > 0 && (group % narrowest_unit == 0 || group >= columns);
}

// Without a mask the rows lie at fixed places, which must exist. With one, offsets say
// where they lie, and codes past the end count as 0.
bool are_codes(const halve_quantized& w) {
  if (w.code_bytes < 0 || !fits(w.code_bytes) || !needs(w.codes, w.code_bytes)) {
    return false;
  }
  if (w.mask != nullptr) return w.offsets != nullptr;
  const double stride = double(code_bytes_of(w.columns, w.bits));
  return w.offsets == nullptr && w.rows * stride <= w.code_bytes;
}

bool is_quantized(const halve_quantized* w) {
  return w != nullptr && is_shape(w->rows, w->columns) && are_bits(w->bits) &&
         is_flag(w->wide_offsets) && is_midrise(*w) && is_group(w->group, w->columns) &&
         needs(w->scales, double(w->rows) * w->columns) && are_codes(*w);
}

int32_t linear(const halve_quantized& w, Precision precision, const Operands& given,
               int32_t threads) {
  if (w.rows == 0 || given.batch == 0) return HALVE_OK;
  const QuantizedKernel& kernel = selected_quantized_kernel();
  const int64_t grain = given.batch == 1 ? 1 : tile_rows;
  const double products = double(w.rows) * w.columns * given.batch;
  const int useful = useful_threads(threads, products, w.rows, grain);
  const Memory memory(kernel.arranged_bytes(w, precision, given.batch),
                      kernel.workspace_bytes(w, precision, given.batch), useful);
  if (!memory.allocated()) return HALVE_NO_MEMORY;
  kernel.arrange(w, precision, given.x, given.batch, memory.shared());
  const Operands o = {memory.shared(), given.batch, given.bias, given.y};
  parallel_for(w.rows, grain, useful, [&](Range range, int thread) {
    kernel.product(w, precision, o, range, memory.workspace(thread));
  });
  return HALVE_OK;
}

// Writes `count` rows to `out`. `write(kernel, range, out, workspace)` writes those of
// a range.
template <class Write>
int32_t write_rows(const halve_quantized& w, int32_t dtype, int64_t count, void* out,
                   int32_t threads, Write write) {
  const QuantizedKernel& kernel = selected_quantized_kernel();
  const int useful = useful_threads(threads, double(count) * w.columns, count, 1);
  const Memory memory(0, kernel.workspace_bytes(w, {dtype, HALVE_INT16}, 1), useful);
  if (!memory.allocated()) return HALVE_NO_MEMORY;
  const int64_t row_bytes = w.columns * size_of(dtype);
  parallel_for(count, 1, useful, [&](Range range, int thread) {
    char* to = static_cast<char*>(out) + range.first * row_bytes;
    write(kernel, range, to, memory.workspace(thread));
  });
  return HALVE_OK;
}

bool are_indices(const int64_t* indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= rows) return false;
  }
  return true;
}

}  // namespace
}  // namespace halve

using halve::Operands;
using halve::QuantizedKernel;
using halve::Range;

int32_t halve_quantized_linear(const halve_quantized* w, int32_t dtype, const void* x,
                               int64_t batch, const void* bias, void* y,
                               int32_t activations, int32_t threads) {
  const Operands o = {x, batch, bias, y};
  if (threads < 1 || !halve::is_dtype(dtype) ||
      (activations != HALVE_INT16 && activations != HALVE_INT8) ||
      !halve::is_quantized(w) || !halve::are_operands(o, w->rows, w->columns)) {
    return HALVE_BAD_ARGUMENT;
  }
  return halve::linear(*w, {dtype, activations}, o, threads);
}

int32_t halve_quantized_unpack(const halve_quantized* w, int64_t first, int64_t last,
                               int32_t dtype, void* out, int32_t threads) {
  if (threads < 1 || !halve::is_dtype(dtype) || !halve::is_quantized(w) || first < 0 ||
      last < first || last > w->rows ||
      !halve::needs(out, double(last - first) * w->columns)) {
    return HALVE_BAD_ARGUMENT;
  }
  return halve::write_rows(
      *w, dtype, last - first, out, threads,
      [&](const QuantizedKernel& kernel, Range range, void* to, void* workspace) {
        const Range rows = {first + range.first, first + range.last};
        kernel.unpack(*w, dtype, rows, to, workspace);
      });
}

int32_t halve_quantized_lookup(const halve_quantized* w, const int64_t* indices,
                               int64_t count, int32_t dtype, void* out,
                               int32_t threads) {
  if (threads < 1 || !halve::is_dtype(dtype) || !halve::is_quantized(w) || count < 0 ||
      !halve::needs(indices, count) || !halve::fits(4.0 * count * w->columns) ||
      !halve::needs(out, double(count) * w->columns) ||
      !halve::are_indices(indices, count, w->rows)) {
    return HALVE_BAD_ARGUMENT;
  }
  const int64_t row_bytes = w->columns * halve::size_of(dtype);
  return halve::write_rows(
      *w, dtype, count, out, threads,
      [&](const QuantizedKernel& kernel, Range range, void* out_of_range,
          void* workspace) {
        char* to = static_cast<char*>(out_of_range);
        for (int64_t i = range.first; i < range.last; ++i, to += row_bytes) {
          kernel.unpack(*w, dtype, {indices[i], indices[i] + 1}, to, workspace);
        }
      });
}
