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
#define HALVE_ABI 2

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

/* A matrix W [rows, columns] of integer codes: W = (code - zero) * scale.

   Columns are cut into groups of `group` that share a scale and a zero point. Codes are
   unsigned numbers of `bits` bits; code i of a row lies at the bits [bits * i,
   bits * (i + 1)) of the row's bytes, lowest bit first.

   mask:    NULL: every weight has a code, and row r begins at the byte
            r * ceil(columns * bits / 8). Otherwise as in halve_packed: only weights
            whose bit is set have codes, the others are 0.
   offsets: NULL without a mask; otherwise [rows + 1], the byte where each row begins.
   scales:  float16 [rows, ceil(columns / group)].
   zeros:   the code of 0 in each group, [rows, ceil(groups * bits / 8)] bytes, packed as
            codes are; NULL: 2^(bits - 1), or 2^(bits - 1) - 1/2 where `midrise` is 1.

   No alignment is required. Whatever mask, offsets, scales, zeros and codes contain, no
   read leaves the arrays. */
typedef struct {
  const void* codes; /* may be NULL if code_bytes is 0 */
  int64_t code_bytes;
  const void* mask;
  const void* offsets;
  const void* scales;
  const void* zeros;
  int32_t wide_offsets; /* 0: uint32_t, 1: uint64_t */
  int32_t bits;         /* 2, 3, 4 or 8 */
  int32_t midrise;      /* 1: zero lies midway between two codes; without zeros, and
                           of 2 to 4 bits */
  int64_t group;        /* a multiple of 32, or at least `columns` */
  int64_t rows, columns;
} halve_quantized;

/* How activations are multiplied with codes: as integers with one scale for each group
   of columns. 16 bits lose less than bfloat16 activations do; 8 bits are faster and
   lose more. */
enum { HALVE_INT16 = 0, HALVE_INT8 = 1 };

/* Computes y[batch, rows] = x[batch, columns] W^T + bias[rows], where x, y and bias have
   the dtype `dtype` and are contiguous; bias may be NULL. If x has an infinity or a NaN,
   the results of its vector are NaN. */
HALVE_API int32_t halve_quantized_linear(const halve_quantized* w, int32_t dtype,
                                         const void* x, int64_t batch, const void* bias,
                                         void* y, int32_t activations, int32_t threads);

/* Writes rows [first, last) of W as a dense matrix of `dtype`, each value rounded once
   from float32. Weights without a code are 0, never -0; so are codes equal to zero. */
HALVE_API int32_t halve_quantized_unpack(const halve_quantized* w, int64_t first,
                                         int64_t last, int32_t dtype, void* out,
                                         int32_t threads);

/* Writes the rows whose indices are given, as halve_quantized_unpack does: the lookup of
   an embedding. HALVE_BAD_ARGUMENT if an index is not in [0, rows). */
HALVE_API int32_t halve_quantized_lookup(const halve_quantized* w,
                                         const int64_t* indices, int64_t count,
                                         int32_t dtype, void* out, int32_t threads);

/* Computes what the attention of one new token reads from a cache of keys and values:
   out[s, h] = softmax(scale query[s, h] K^T) V, for the keys and values of sequence s
   and of head h / (heads / key_heads). There is no mask: all `length` positions count.

   query, out: [batch, heads, width], contiguous, of `dtype`, as are keys and values.
   keys, values: [batch, key_heads, length, width], rows of `width` contiguous numbers.
   key_strides, value_strides: distances between sequences, heads and positions, in
   numbers.

   Scores and sums are accumulated in float32 or double, and rounded once. */
typedef struct {
  const void* query;
  const void* keys;
  const void* values;
  int32_t dtype;
  float scale;
  int64_t batch, heads, key_heads, length, width;
  int64_t key_strides[3], value_strides[3];
} halve_attention;

HALVE_API int32_t halve_attend(const halve_attention* a, void* out, int32_t threads);

/* The operations of a decode step. x, other and y are contiguous arrays of `dtype`;
   x and y are [rows, columns] unless something else is said, and may be the same.

   HALVE_PACKED:     y [rows, size] = x W^T + bias; other: a halve_packed
   HALVE_DENSE:      the same; other: W [size, columns]
   HALVE_QUANTIZED:  the same; other: a halve_quantized; option: the activations
   HALVE_NORM:       y = other * (x / sqrt(mean(x^2) + epsilon)), row by row;
                     other: [columns]
   HALVE_ROTATE:     y = x * cos + (-x2, x1) * sin, where x1 and x2 are the halves of a
                     row; other: [positions, 2, columns], the cosines, then the sines
   HALVE_STORE:      copies row r to row `position` of the array at y + r * size numbers
   HALVE_ATTEND:     as halve_attend into y, for `position` + 1 positions; other: a
                     halve_attention
   HALVE_GATE:       y = silu(x) * other
   HALVE_ADD:        y = x + other */
enum {
  HALVE_PACKED = 0,
  HALVE_DENSE = 1,
  HALVE_QUANTIZED = 2,
  HALVE_NORM = 3,
  HALVE_ROTATE = 4,
  HALVE_STORE = 5,
  HALVE_ATTEND = 6,
  HALVE_GATE = 7,
  HALVE_ADD = 8
};

typedef struct {
  int32_t kind;
  int32_t dtype;
  int64_t rows, columns, size;
  const void* x;
  const void* other;
  const void* bias; /* may be NULL */
  void* y;
  float epsilon;
  int32_t option;
} halve_operation;

/* Runs operations one after another: a decode step of a model without the costs of
   calling each from another language. Its threads stay together for all of them, and
   spin where they wait for each other. `position` is the number of tokens before the
   new one. Returns the status of the first operation that fails. */
HALVE_API int32_t halve_run(const halve_operation* operations, int64_t count,
                            int64_t position, int32_t threads);

/* Reads `bytes` bytes with `threads` threads, to measure memory bandwidth. Returns a
   sum of what it read, so that the reads are not optimized away. */
HALVE_API uint64_t halve_read(const void* memory, int64_t bytes, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
