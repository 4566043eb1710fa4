// Parallel loops over rows; without OpenMP there is one thread. Must not be included by
// files that are compiled for one instruction set (see generic.h).

#ifndef HALVE_THREADS_H
#define HALVE_THREADS_H

#include "kernel.h"
#include "team.h"

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

// Calls `body(index, count)` with the indices of `count` threads, which is at most
// `threads`.
template <class Body>
void on_threads([[maybe_unused]] int threads, Body body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

// Calls `body(range, thread)` on at most `threads` threads, those of the team where the
// caller leads one. Each thread gets one contiguous range, so that it reads one long
// stream, which can be prefetched.
template <class Body>
void parallel_for(int64_t size, int64_t grain, int threads, Body body) {
  const auto part = [&](int index, int count) {
    const int used = count < threads ? count : threads;
    if (index < used) body(part_of(size, grain, index, used), index);
  };
  Team* team = Team::current();
  if (team != nullptr && threads > 1) {
    team->run(part);
  } else {
    on_threads(threads, part);
  }
}

// Calls `work()` on this thread, which leads a team of at most `threads` meanwhile: its
// parallel loops cost less.
template <class Work>
void with_team(int threads, Work work) {
  Team team;
  on_threads(threads, [&](int index, int count) {
    if (index == 0) {
      team.lead(count, work);
    } else {
      team.follow(index);
    }
  });
}

}  // namespace halve

#endif
