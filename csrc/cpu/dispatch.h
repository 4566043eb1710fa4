// The kernels in use, chosen by what the CPU can run.

#ifndef HALVE_DISPATCH_H
#define HALVE_DISPATCH_H

#include "kernel.h"

namespace halve {

const Kernel& selected_kernel(int32_t dtype);

}  // namespace halve

#endif
