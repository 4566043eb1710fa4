// Memory for the duration of one call, kept for the next one.

#ifndef HALVE_SCRATCH_H
#define HALVE_SCRATCH_H

#include <cstddef>

namespace halve {

// At least `bytes` bytes, 64-byte aligned, of the calling thread's own, valid until its
// next call; NULL if there is no memory. Grows and never shrinks: a model calls with
// the same few sizes again and again. Freed when the thread ends.
void* scratch(size_t bytes);

}  // namespace halve

#endif
