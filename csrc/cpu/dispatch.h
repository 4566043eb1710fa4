// The selected kernels: the best that this CPU can run, unless another was chosen.

#ifndef HALVE_DISPATCH_H
#define HALVE_DISPATCH_H

#include "kernel.h"

namespace halve {

const Kernel& selected_kernel(int32_t dtype);
const QuantizedKernel& selected_quantized_kernel();
const StepKernel& selected_step_kernel(int32_t dtype);

}  // namespace halve

#endif
