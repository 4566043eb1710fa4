// Horizontal sums of eight registers at once, by a tree of pairwise sums: about half
// the instructions of eight separate sums. For AVX2 and AVX-512.

#ifndef HALVE_SUM_EIGHT_H
#define HALVE_SUM_EIGHT_H

#include <immintrin.h>

namespace {

inline __m256 sum_eight(const __m256 (&v)[8]) {
  const __m256 a = _mm256_hadd_ps(v[0], v[1]), b = _mm256_hadd_ps(v[2], v[3]);
  const __m256 c = _mm256_hadd_ps(v[4], v[5]), d = _mm256_hadd_ps(v[6], v[7]);
  const __m256 first = _mm256_hadd_ps(a, b), second = _mm256_hadd_ps(c, d);
  // Each 128-bit half holds four sums, each over half of one input register.
  const __m256 low = _mm256_permute2f128_ps(first, second, 0x20);
  const __m256 high = _mm256_permute2f128_ps(first, second, 0x31);
  return _mm256_add_ps(low, high);
}

#if defined(__AVX512DQ__)

inline __m256 sum_eight(const __m512* v) {
  __m256 halves[8];
  for (int r = 0; r < 8; ++r) {
    const __m256 high = _mm512_extractf32x8_ps(v[r], 1);
    halves[r] = _mm256_add_ps(_mm512_castps512_ps256(v[r]), high);
  }
  return sum_eight(halves);
}

#endif

}  // namespace

#endif
