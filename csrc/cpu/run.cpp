// Runs the operations of a decode step one after another. The products and attention
// divide their work among threads; the rest is a few thousand numbers.

#include <cstring>

#include "dispatch.h"
#include "entry.h"
#include "threads.h"

namespace halve {
namespace {

const char* bytes_after(const void* from, int64_t numbers, int32_t dtype) {
  return static_cast<const char*>(from) + numbers * size_of(dtype);
}

bool is_operation(const halve_operation& o) {
  return is_dtype(o.dtype) && is_shape(o.rows, o.columns) && o.size >= 0 &&
         o.y != nullptr && (o.x != nullptr || o.kind == HALVE_ATTEND) &&
         (o.other != nullptr || o.kind == HALVE_STORE);
}

void store(const halve_operation& o, int64_t position) {
  for (int64_t row = 0; row < o.rows; ++row) {
    const int64_t to = row * o.size + position * o.columns;
    std::memcpy(static_cast<char*>(o.y) + to * size_of(o.dtype),
                bytes_after(o.x, row * o.columns, o.dtype),
                o.columns * size_of(o.dtype));
  }
}

int32_t attend(const halve_operation& o, int64_t position, int32_t threads) {
  halve_attention attention = *static_cast<const halve_attention*>(o.other);
  attention.length = position + 1;
  return halve_attend(&attention, o.y, threads);
}

int32_t run(const halve_operation& o, int64_t position, int32_t threads) {
  if (!is_operation(o)) return HALVE_BAD_ARGUMENT;
  const StepKernel& kernel = selected_step_kernel(o.dtype);
  switch (o.kind) {
    case HALVE_PACKED:
      return halve_packed_linear(static_cast<const halve_packed*>(o.other), o.x, o.rows,
                                 o.bias, o.y, threads);
    case HALVE_DENSE:
      return halve_dense_linear(o.other, o.dtype, o.size, o.columns, o.x, o.rows,
                                o.bias, o.y, threads);
    case HALVE_QUANTIZED:
      return halve_quantized_linear(static_cast<const halve_quantized*>(o.other),
                                    o.dtype, o.x, o.rows, o.bias, o.y, o.option,
                                    threads);
    case HALVE_NORM: kernel.norm(o); break;
    case HALVE_ROTATE:
      kernel.rotate(o, bytes_after(o.other, 2 * position * o.columns, o.dtype));
      break;
    case HALVE_STORE: store(o, position); break;
    case HALVE_ATTEND: return attend(o, position, threads);
    case HALVE_GATE: kernel.gate(o); break;
    case HALVE_ADD: kernel.add(o); break;
    default: return HALVE_BAD_ARGUMENT;
  }
  return HALVE_OK;
}

}  // namespace
}  // namespace halve

int32_t halve_run(const halve_operation* operations, int64_t count, int64_t position,
                  int32_t threads) {
  if (operations == nullptr || position < 0 || threads < 1) return HALVE_BAD_ARGUMENT;
  int32_t status = HALVE_OK;
  halve::with_team(threads, [&] {
    for (int64_t i = 0; i < count && status == HALVE_OK; ++i) {
      status = halve::run(operations[i], position, threads);
    }
  });
  return status;
}
