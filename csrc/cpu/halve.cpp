// The entry points for packed and dense matrices (quantized.cpp has those for codes):
// they check their arguments, allocate scratch memory, split the rows among threads and
// call the selected kernel. The arithmetic is in the kernels.

#include "halve.h"

#include <cstring>

#include "dispatch.h"
#include "entry.h"
#include "packed.h"
#include "threads.h"

namespace halve {
namespace {

bool is_packed(const halve_packed* w) {
  return w != nullptr && is_dtype(w->dtype) && is_shape(w->rows, w->columns) &&
         w->kept >= 0 && fits(4.0 * w->kept) &&
         (w->wide_offsets == 0 || w->wide_offsets == 1) && needs(w->values, w->kept) &&
         needs(w->mask, double(w->rows) * w->columns) && needs(w->offsets, w->rows);
}

// Computes a product with packed or dense weights. `run(kernel, operands, range,
// workspace)` computes the outputs of a range of rows.
template <class Run>
int32_t linear(int32_t dtype, int64_t rows, int64_t columns, double products,
               const Operands& given, int32_t threads, Run run) {
  if (rows == 0 || given.batch == 0) return HALVE_OK;
  const Kernel& kernel = selected_kernel(dtype);
  const int64_t grain = given.batch == 1 ? 1 : tile_rows;
  const int useful = useful_threads(threads, products, rows, grain);
  const double arranged = kernel.arranged_bytes(given.batch, columns);
  const double workspace = kernel.workspace_bytes(given.batch, columns);
  const Memory memory(arranged, workspace, useful);
  if (!memory.allocated()) return HALVE_NO_MEMORY;
  kernel.arrange(given.x, given.batch, columns, memory.shared());
  const Operands o = {memory.shared(), given.batch, given.bias, given.y};
  parallel_for(rows, grain, useful, [&](Range range, int thread) {
    run(kernel, o, range, memory.workspace(thread));
  });
  return HALVE_OK;
}

// Eight independent sums, so that reads are limited by memory and not by the latency of
// the additions.
uint64_t sum_words(const char* memory, int64_t bytes) {
  constexpr int64_t at_once = 8;
  const int64_t words = bytes / 8, whole = words / at_once * at_once;
  uint64_t sums[at_once] = {};
  for (int64_t i = 0; i < whole; i += at_once) {
    for (int64_t j = 0; j < at_once; ++j) sums[j] += read<uint64_t>(memory, i + j);
  }
  for (int64_t i = whole; i < words; ++i) sums[0] += read<uint64_t>(memory, i);
  for (int64_t i = words * 8; i < bytes; ++i) sums[0] += uint8_t(memory[i]);
  for (int64_t j = 1; j < at_once; ++j) sums[0] += sums[j];
  return sums[0];
}

}  // namespace
}  // namespace halve

using halve::Dense;
using halve::Kernel;
using halve::Operands;
using halve::Range;

int32_t halve_packed_linear(const halve_packed* w, const void* x, int64_t batch,
                            const void* bias, void* y, int32_t threads) {
  const Operands o = {x, batch, bias, y};
  if (threads < 1 || !halve::is_packed(w) ||
      !halve::are_operands(o, w->rows, w->columns)) {
    return HALVE_BAD_ARGUMENT;
  }
  const double products = (double(w->kept) + w->rows) * batch;
  return halve::linear(
      w->dtype, w->rows, w->columns, products, o, threads,
      [&](const Kernel& kernel, const Operands& arranged, Range rows, void* workspace) {
        kernel.packed(*w, arranged, rows, workspace);
      });
}

int32_t halve_dense_linear(const void* weight, int32_t dtype, int64_t rows,
                           int64_t columns, const void* x, int64_t batch,
                           const void* bias, void* y, int32_t threads) {
  const Operands o = {x, batch, bias, y};
  if (threads < 1 || !halve::is_dtype(dtype) || !halve::is_shape(rows, columns) ||
      !halve::needs(weight, double(rows) * columns) ||
      !halve::are_operands(o, rows, columns)) {
    return HALVE_BAD_ARGUMENT;
  }
  const Dense w = {weight, rows, columns};
  return halve::linear(
      dtype, rows, columns, double(rows) * columns * batch, o, threads,
      [&](const Kernel& kernel, const Operands& arranged, Range range,
          void* workspace) { kernel.dense(w, arranged, range, workspace); });
}

int32_t halve_unpack(const halve_packed* w, int64_t first, int64_t last, void* out,
                     int32_t threads) {
  if (threads < 1 || !halve::is_packed(w) || first < 0 || last < first ||
      last > w->rows || !halve::needs(out, double(last - first) * w->columns)) {
    return HALVE_BAD_ARGUMENT;
  }
  const Kernel& kernel = halve::selected_kernel(w->dtype);
  const double weights = double(last - first) * w->columns;
  const int useful = halve::useful_threads(threads, weights, last - first, 1);
  const halve::Memory memory(0, kernel.workspace_bytes(1, w->columns), useful);
  if (!memory.allocated()) return HALVE_NO_MEMORY;
  const int64_t row_bytes = w->columns * halve::size_of(w->dtype);
  halve::parallel_for(last - first, 1, useful, [&](Range range, int thread) {
    char* to = static_cast<char*>(out) + range.first * row_bytes;
    kernel.unpack(*w, {first + range.first, first + range.last}, to,
                  memory.workspace(thread));
  });
  return HALVE_OK;
}

uint64_t halve_read(const void* memory, int64_t bytes, int32_t threads) {
  if (memory == nullptr || bytes <= 0 || threads < 1) return 0;
  const halve::Memory sums(0, sizeof(uint64_t), threads);
  uint64_t total = 0;
  if (!sums.allocated()) return total;
  for (int t = 0; t < threads; ++t) std::memset(sums.workspace(t), 0, sizeof(uint64_t));
  halve::parallel_for(bytes, 4096, threads, [&](Range range, int thread) {
    const char* from = static_cast<const char*>(memory) + range.first;
    const uint64_t sum = halve::sum_words(from, range.last - range.first);
    std::memcpy(sums.workspace(thread), &sum, sizeof(sum));
  });
  for (int t = 0; t < threads; ++t) total += read<uint64_t>(sums.workspace(t), 0);
  return total;
}
