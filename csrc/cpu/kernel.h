// The interface of a kernel: the functions that one instruction set provides for one
// dtype. Files that are compiled for different CPUs include this header, so it declares
// plain data only; inline functions would be unsafe here (see generic.h).

#ifndef HALVE_KERNEL_H
#define HALVE_KERNEL_H

#include <cstddef>
#include <cstdint>

#include "halve.h"

namespace halve {

constexpr int dtype_count = 3;

// Rows expanded together when x is a batch; a thread gets a multiple of it.
constexpr int64_t tile_rows = 8;

struct Range {
  int64_t first, last;
};

struct Dense {
  const void* weight;
  int64_t rows, columns;
};

// The operands of a product besides its weights.
struct Operands {
  const void* x;  // in the layout that `arrange` writes
  int64_t batch;
  const void* bias;  // NULL: none
  void* y;
};

// Every `workspace` is 64-byte aligned, private to the calling thread, and at least as
// large as `workspace_bytes` returns; likewise `arranged` and `arranged_bytes`, except
// that all threads read it.
struct Kernel {
  // Sizes in bytes. They are floating-point numbers so that they cannot overflow; the
  // caller checks them against a limit before it converts them.
  double (*arranged_bytes)(int64_t batch, int64_t columns);
  double (*workspace_bytes)(int64_t batch, int64_t columns);

  // Copies x into the order and the type in which the kernel reads it, with columns
  // padded with zeros to whole words of the mask, so that no kernel reads past the end
  // of x.
  void (*arrange)(const void* x, int64_t batch, int64_t columns, void* arranged);

  void (*packed)(const halve_packed&, const Operands&, Range rows, void* workspace);
  void (*dense)(const Dense&, const Operands&, Range rows, void* workspace);

  // Writes rows [rows.first, rows.last) to `out`, whose first row is rows.first.
  void (*unpack)(const halve_packed&, Range rows, void* out, void* workspace);
};

// Indexed by dtype. Only the kernels of the target architecture are defined.
extern const Kernel reference_kernels[dtype_count];
extern const Kernel avx2_kernels[dtype_count];
extern const Kernel avx512f_kernels[dtype_count];
extern const Kernel neon_kernels[dtype_count];
// There are none for the other dtypes, which gain nothing from this instruction set.
extern const Kernel avx512bf16_bf16_kernel;

// The numbers of a product with integer codes.
struct Precision {
  int32_t dtype;        // of x, bias and y
  int32_t activations;  // HALVE_INT16 or HALVE_INT8
};

// The functions that one instruction set provides for matrices of integer codes. The
// dtype is an argument, because the loops over codes do not depend on it. For
// `arranged`, `workspace` and the sizes see Kernel.
struct QuantizedKernel {
  double (*arranged_bytes)(const halve_quantized&, Precision, int64_t batch);
  double (*workspace_bytes)(const halve_quantized&, Precision, int64_t batch);

  // Turns x into integers, in the order in which the kernel reads them.
  void (*arrange)(const halve_quantized&, Precision, const void* x, int64_t batch,
                  void* arranged);

  void (*product)(const halve_quantized&, Precision, const Operands&, Range rows,
                  void* workspace);

  // As Kernel's, with the workspace of a batch of one.
  void (*unpack)(const halve_quantized&, int32_t dtype, Range rows, void* out,
                 void* workspace);
};

extern const QuantizedKernel reference_quantized_kernel;
extern const QuantizedKernel avx2_quantized_kernel;
extern const QuantizedKernel avx512bf16_quantized_kernel;
extern const QuantizedKernel neon_quantized_kernel;

// What a decode step computes beside products, for one dtype; see the operations in
// halve.h.
struct StepKernel {
  // Attention of the query heads [heads.first, heads.last) of all sequences, counted
  // through. The workspace has room for a query and all scores.
  void (*attend)(const halve_attention&, void* out, Range heads, void* workspace);

  void (*norm)(const halve_operation&);
  // `table` holds the cosines, then the sines, of the position.
  void (*rotate)(const halve_operation&, const void* table);
  void (*gate)(const halve_operation&);
  void (*add)(const halve_operation&);
};

// Indexed by dtype.
extern const StepKernel reference_step[dtype_count];
extern const StepKernel avx2_step[dtype_count];
extern const StepKernel avx512f_step[dtype_count];
extern const StepKernel neon_step[dtype_count];

}  // namespace halve

#endif
