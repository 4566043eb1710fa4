// The C interface of libhalve_kernels: products with pruned weights, kept as a bitmask
// and the weights that are left. Plain C types only, so that any language can call it;
// no file format, no tensors and no choice of what to prune.

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

/* Raised when a function or a struct below changes its meaning. */
#define HALVE_ABI 1

enum { HALVE_F32 = 0, HALVE_F16 = 1, HALVE_BF16 = 2 };

enum {
  HALVE_OK = 0,
  HALVE_BAD_ARGUMENT = 1,   /* a negative size, NULL where data is needed, ... */
  HALVE_NO_MEMORY = 2,      /* no room for scratch memory; nothing was written */
  HALVE_NO_SUCH_KERNEL = 3, /* no kernel has this name */
  HALVE_UNSUPPORTED = 4     /* the kernel exists, but this CPU cannot run it */
};

/* A pruned matrix W [rows, columns].

   mask:    rows x ceil(columns / 64) words; bit j of word k keeps column 64 k + j.
   values:  the kept weights, row after row, in column order.
   offsets: where each row's values begin, and after them `kept`: rows + 1 numbers.

   Nothing here need be aligned. A mask or offsets that lie give a wrong answer, never a
   read outside values, mask or offsets: a missing value counts as zero. */
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

/* Chooses the kernels by name: "reference", "avx2", "avx512f", "avx512bf16", "neon";
   "" or NULL: the best that this CPU has. Holds for the whole process. */
HALVE_API int32_t halve_select(const char* name);
HALVE_API const char* halve_selected(void);

/* The names usable on this CPU, best first, separated by commas. */
HALVE_API const char* halve_available(void);

/* y[batch, rows] = x[batch, columns] W^T + bias, where x, y and bias have W's dtype and
   are contiguous; bias may be NULL. The sum is kept in float32 or better and rounded
   once. A pruned weight is a zero that takes part: 0 times infinity is NaN, as it is in
   a dense product. */
HALVE_API int32_t halve_packed_linear(const halve_packed* w, const void* x,
                                      int64_t batch, const void* bias, void* y,
                                      int32_t threads);

/* Rows [first, last) of W as a dense matrix of its dtype, bit for bit. */
HALVE_API int32_t halve_unpack(const halve_packed* w, int64_t first, int64_t last,
                               void* out, int32_t threads);

/* The same product for a dense W [rows, columns]: the honest yardstick. */
HALVE_API int32_t halve_dense_linear(const void* weight, int32_t dtype, int64_t rows,
                                     int64_t columns, const void* x, int64_t batch,
                                     const void* bias, void* y, int32_t threads);

/* Reads `bytes` bytes with all threads, to measure memory bandwidth. The checksum it
   returns keeps the reads from being optimised away. */
HALVE_API uint64_t halve_read(const void* memory, int64_t bytes, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
