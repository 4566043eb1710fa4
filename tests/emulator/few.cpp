// The kernels of few.cu as a library for the CPU.
#include "cuda.h"

#include "few.cu"

extern "C" void run_few(int blocks, int splits, int threads, const uint16_t *values,
                        const uint64_t *mask, const uint16_t *starts,
                        const uint32_t *offsets, int offset_stride, int rows, int words,
                        int pitch, const uint16_t *x, const uint16_t *bias, uint16_t *y,
                        float *parts, int samples, int columns) {
  launch(blocks, splits, threads, [&] {
    halve_few(values, mask, starts, offsets, offset_stride, rows, words, pitch, x, bias, y,
              parts, samples, columns);
  });
}

extern "C" void run_few_sum(int blocks, int one, int threads, const float *parts,
                            const uint16_t *bias, uint16_t *y, int splits, int samples,
                            int rows) {
  launch(blocks, one, threads,
         [&] { halve_few_sum(parts, bias, y, splits, samples, rows); });
}
