// Parallel loops over rows; without OpenMP there is one thread. Must not be included by
// files that are compiled for one instruction set (see generic.h).

#ifndef HALVE_THREADS_H
#define HALVE_THREADS_H

#include "kernel.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace halve {

// Returns part `index` of `count` parts of [0, size), each of which begins at a
// multiple of `grain`.
inline Range part_of(int64_t size, int64_t grain, int64_t index, int64_t count) {
  const int64_t grains = size / grain + (size % grain != 0);
  const int64_t each = grains / count, more = grains % count;
  const int64_t first = each * index + (index < more ? index : more);
  const int64_t last = first + each + (index < more);
  return {first * grain, last * grain < size ? last * grain : size};
}

// Calls `body(range, thread)` on at most `threads` threads. Each thread gets one
// contiguous range, so that it reads one long stream, which can be prefetched.
template <class Body>
void parallel_for(int64_t size, [[maybe_unused]] int64_t grain,
                  [[maybe_unused]] int threads, Body body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int index = omp_get_thread_num();
      body(part_of(size, grain, index, omp_get_num_threads()), index);
    }
    return;
  }
#endif
  body(Range{0, size}, 0);
}

}  // namespace halve

#endif
