// The bfloat16 kernel for CPUs with AVX-512 BF16 and VBMI2.

#include "bfloat16_lanes_avx512.h"

const halve::Kernel halve::avx512bf16_bf16_kernel = kernel_of<Bfloat16Lanes>;
