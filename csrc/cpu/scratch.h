// Scratch memory for the duration of one call, reused by the next one.

#ifndef HALVE_SCRATCH_H
#define HALVE_SCRATCH_H

#include <cstddef>

namespace halve {

// Returns at least `bytes` bytes, 64-byte aligned, private to the calling thread and
// valid until its next call; NULL if the allocation fails. The block grows and never
// shrinks, because a model calls with the same few sizes again and again. It is freed
// when the thread ends.
void* scratch(size_t bytes);

}  // namespace halve

#endif
