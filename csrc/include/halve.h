// The C interface of libhalve_kernels: products with pruned weights, which are stored
// as a bitmask and the weights that are not pruned. It uses plain C types only, so that
// any language can call it, and knows nothing of file formats, tensors or pruning.

#ifndef HALVE_H
#define HALVE_H

#include <stdint.h>

#if defined(_WIN32)
#define HALVE_API __declspec(dllexport)
#else
#define HALVE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Increased when a function or a struct below changes its meaning. */
#define HALVE_ABI 1

enum { HALVE_F32 = 0, HALVE_F16 = 1, HALVE_BF16 = 2 };

enum {
  HALVE_OK = 0,
  HALVE_BAD_ARGUMENT = 1,   /* a negative size, NULL where data is needed, ... */
  HALVE_NO_MEMORY = 2,      /* scratch memory could not be allocated; no output */
  HALVE_NO_SUCH_KERNEL = 3, /* no kernel has this name */
  HALVE_UNSUPPORTED = 4     /* the kernel exists, but this CPU cannot run it */
};

/* A pruned matrix W [rows, columns].

   mask:    [rows, ceil(columns / 64)], uint64_t; bit j of word k is set where column
            64 k + j is not pruned.
   values:  [kept], the weights that are not pruned, in row-major order.
   offsets: [rows + 1], the index of each row's first value, then `kept`.

   No alignment is required. An inconsistent mask or offsets give a wrong result, but
   never a read outside of values, mask or offsets: a missing value counts as zero. */
typedef struct {
  const void* values; /* may be NULL if kept is 0 */
  int64_t kept;
  const void* mask;
  const void* offsets;
  int32_t wide_offsets; /* 0: uint32_t, 1: uint64_t */
  int32_t dtype;
  int64_t rows, columns;
} halve_packed;

HALVE_API int32_t halve_abi(void);

/* Selects the kernels by name: "reference", "avx2", "avx512f", "avx512bf16", "neon"; ""
   or NULL select the best that this CPU can run. Applies to the whole process. */
HALVE_API int32_t halve_select(const char* name);
HALVE_API const char* halve_selected(void);

/* Returns the names of the kernels that this CPU can run, best first, separated by
   commas. */
HALVE_API const char* halve_available(void);

/* Computes y[batch, rows] = x[batch, columns] W^T + bias[rows], where x, y and bias
   have W's dtype and are contiguous; bias may be NULL. Sums are accumulated in float32
   or double and rounded once. Pruned weights count as zeros: 0 times infinity is NaN,
   as in a dense product. */
HALVE_API int32_t halve_packed_linear(const halve_packed* w, const void* x,
                                      int64_t batch, const void* bias, void* y,
                                      int32_t threads);

/* Writes rows [first, last) of W as a dense matrix of its dtype, bit for bit. */
HALVE_API int32_t halve_unpack(const halve_packed* w, int64_t first, int64_t last,
                               void* out, int32_t threads);

/* Computes the same product for a dense W [rows, columns], as the baseline that packed
   products are compared with. */
HALVE_API int32_t halve_dense_linear(const void* weight, int32_t dtype, int64_t rows,
                                     int64_t columns, const void* x, int64_t batch,
                                     const void* bias, void* y, int32_t threads);

/* Reads `bytes` bytes with `threads` threads, to measure memory bandwidth. Returns a
   sum of what it read, so that the reads are not optimized away. */
HALVE_API uint64_t halve_read(const void* memory, int64_t bytes, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
