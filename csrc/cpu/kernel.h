// What a kernel is: the few functions that one instruction set offers for one dtype.
// Everything here is plain data, shared by files that are compiled for different CPUs;
// an inline function would be a trap (see generic.h).

#ifndef HALVE_KERNEL_H
#define HALVE_KERNEL_H

#include <cstddef>
#include <cstdint>

#include "halve.h"

namespace halve {

constexpr int dtype_count = 3;

// Rows expanded together when x is a batch; threads get a multiple of it.
constexpr int64_t tile_rows = 8;

struct Range {
  int64_t first, last;
};

struct Dense {
  const void* weight;
  int64_t rows, columns;
};

// What a product needs besides its weights.
struct Operands {
  const void* x;  // as `arrange` left it
  int64_t batch;
  const void* bias;  // NULL: none
  void* y;
};

// Every `workspace` is 64-byte aligned, private to the calling thread, and holds what
// `workspace_bytes` said; likewise `arranged` and `arranged_bytes`.
struct Kernel {
  // Sizes in bytes as floating-point numbers: they cannot overflow, and the caller
  // compares them with what can be allocated before it trusts them.
  double (*arranged_bytes)(int64_t batch, int64_t columns);
  double (*workspace_bytes)(int64_t batch, int64_t columns);

  // Copies x into the order and the type in which the kernel reads it, padded with
  // zeros to whole words, so that no kernel ever reads past the end of x.
  void (*arrange)(const void* x, int64_t batch, int64_t columns, void* arranged);

  void (*packed)(const halve_packed&, const Operands&, Range rows, void* workspace);
  void (*dense)(const Dense&, const Operands&, Range rows, void* workspace);

  // Writes rows [rows.first, rows.last) to `out`, which begins with row rows.first.
  void (*unpack)(const halve_packed&, Range rows, void* out, void* workspace);
};

// Indexed by dtype. Only those of the target architecture are defined.
extern const Kernel reference_kernels[dtype_count];
extern const Kernel avx2_kernels[dtype_count];
extern const Kernel avx512f_kernels[dtype_count];
extern const Kernel neon_kernels[dtype_count];
// The other dtypes gain nothing from this instruction set.
extern const Kernel avx512bf16_bf16_kernel;

}  // namespace halve

#endif
