// The totals of eight AVX registers at once: a tree of pairwise sums, about half the
// instructions of eight totals one by one.

#ifndef HALVE_SUM_EIGHT_H
#define HALVE_SUM_EIGHT_H

#include <immintrin.h>

namespace {

inline __m256 sum_eight(const __m256 (&v)[8]) {
  const __m256 a = _mm256_hadd_ps(v[0], v[1]), b = _mm256_hadd_ps(v[2], v[3]);
  const __m256 c = _mm256_hadd_ps(v[4], v[5]), d = _mm256_hadd_ps(v[6], v[7]);
  const __m256 first = _mm256_hadd_ps(a, b), second = _mm256_hadd_ps(c, d);
  // Each half holds four totals of half a register.
  const __m256 low = _mm256_permute2f128_ps(first, second, 0x20);
  const __m256 high = _mm256_permute2f128_ps(first, second, 0x31);
  return _mm256_add_ps(low, high);
}

}  // namespace

#endif
