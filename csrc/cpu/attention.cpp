// The entry point of attention: checks its arguments and divides the heads among
// threads.

#include "dispatch.h"
#include "entry.h"
#include "threads.h"

namespace halve {
namespace {

// Strides are trusted: like the sizes of the arrays, only the caller knows them.
bool is_attention(const halve_attention* a) {
  return a != nullptr && is_dtype(a->dtype) && a->batch >= 0 && a->key_heads > 0 &&
         a->heads > 0 && a->heads % a->key_heads == 0 && a->length > 0 &&
         a->width > 0 && fits(4.0 * a->batch * a->heads * a->length * a->width) &&
         needs(a->query, a->batch) && needs(a->keys, a->batch) &&
         needs(a->values, a->batch);
}

// A query and the scores of all positions, padded, as doubles in the reference kernel.
double workspace_bytes(const halve_attention& a) {
  return (double(a.width) + a.length + 128) * sizeof(double);
}

}  // namespace
}  // namespace halve

int32_t halve_attend(const halve_attention* a, void* out, int32_t threads) {
  if (threads < 1 || !halve::is_attention(a) || !halve::needs(out, a->batch)) {
    return HALVE_BAD_ARGUMENT;
  }
  const halve::StepKernel& kernel = halve::selected_step_kernel(a->dtype);
  const int64_t heads = a->batch * a->heads;
  const double products = 2.0 * heads * a->length * a->width;
  const int useful = halve::useful_threads(threads, products, heads, 1);
  const halve::Memory memory(0, halve::workspace_bytes(*a), useful);
  if (!memory.allocated()) return HALVE_NO_MEMORY;
  halve::parallel_for(heads, 1, useful, [&](halve::Range range, int thread) {
    kernel.attend(*a, out, range, memory.workspace(thread));
  });
  return HALVE_OK;
}
