// y = x W^T for up to 8 * N_TILES rows x and a matrix W in bitmask format, by tensor cores.
//
// A warp owns COLUMNS neighbouring columns, whose inputs it keeps in registers, and takes
// tile after tile of ROWS rows. The values of a tile are copied to shared memory while the
// tile before is multiplied. There every lane finds the values of its fragment of the mma
// instruction by counting bits of the mask. Lane t of quad g has rows g and g + 8, and of
// every 16 columns those from 4t to 4t + 3: the instruction wants others, but its columns
// may be permuted if those of x are permuted alike.
//
// Compiled by NVRTC with -DN_TILES=1 or 2, -DMAX_WARPS and, for float16, -DHALF=1. The
// tests define EMULATED and give what is between `#ifndef EMULATED` themselves.

#ifndef EMULATED
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#endif

#ifndef N_TILES
#define N_TILES 1
#endif
#ifndef HALF
#define HALF 0
#endif
#ifndef MAX_WARPS
#define MAX_WARPS 16
#endif

constexpr int ROWS = 16, WORDS = 4, COLUMNS = 64 * WORDS, STAGES = 2;
constexpr int SAMPLES = 8 * N_TILES;  // rows of x
constexpr uint32_t ALL = 0xffffffffu;

#ifndef EMULATED
#define DEVICE __device__ __forceinline__

DEVICE uint32_t shuffle(uint32_t v, int lane) { return __shfl_sync(ALL, v, lane); }
DEVICE int lane_id() { return threadIdx.x & 31; }
DEVICE int warp_id() { return threadIdx.x >> 5; }
DEVICE int thread_id() { return threadIdx.x; }
DEVICE int threads() { return blockDim.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int blocks_x() { return gridDim.x; }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE int popcount(uint32_t v) { return __popc(v); }
// Unlike __byte_perm it needs no mask for the selector, whose bits above 16 are ignored.
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t found;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(selector));
  return found;
}
DEVICE uint32_t shift_wrap(uint32_t low, uint32_t high, uint32_t by) {
  return __funnelshift_r(low, high, by);
}
extern __shared__ uint4 shared_memory_[];
DEVICE uint8_t *shared_memory() { return (uint8_t *)shared_memory_; }
// Copy 16 bytes to shared memory in the background.
DEVICE void copy_async_if(bool condition, void *to, const void *from) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; "
               "@p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(
                   (uint32_t)__cvta_generic_to_shared(to)),
               "l"(from), "r"((uint32_t)condition));
}
DEVICE void commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if HALF
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE float widen(uint16_t v) {
#if HALF
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#else
  return __uint_as_float((uint32_t)v << 16);
#endif
}
DEVICE uint16_t narrow(float f) {
  uint16_t v;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
#endif
  return v;
}
DEVICE uint64_t load(const uint64_t *p) { return __ldg(p); }
DEVICE uint32_t load(const uint32_t *p) { return __ldg(p); }
DEVICE uint16_t load(const uint16_t *p) { return __ldg(p); }
#endif

DEVICE uint32_t load_shared(uint32_t offset) {
  return *(const uint32_t *)(shared_memory() + offset);
}

// A packed matrix.
struct Matrix {
  const uint16_t *values;   // [kept + slack]
  const uint64_t *mask;     // [rows, words]
  const uint16_t *starts;   // [rows, words]: values of the row before each word
  const uint32_t *offsets;  // [rows + 1]: values before each row, every `offset_stride`
  int offset_stride, rows, words;
};

// What a lane loads of a row before its values: nothing is done with it until they are
// asked for, a turn later, so that no warp waits for memory.
struct Row {
  uint64_t word;    // word t of the tile
  uint32_t start;   // values of the row before it
  uint32_t offset;  // values of the matrix before the row
  uint32_t last;    // values of the row up to the tile's end; in the last tile of a row,
                    // values of the matrix up to there
};

// What it needs to decode the row: word t, and the offset of its first value in shared
// memory.
struct Place {
  uint64_t word;
  uint32_t at;
};

DEVICE Row read_row(const Matrix &w, int row, int first, int t) {
  row = row < w.rows ? row : w.rows - 1;
  const int word = first + t < w.words ? first + t : w.words - 1;
  const long long at = (long long)row * w.words;
  const uint32_t *offset = w.offsets + (long long)row * w.offset_stride;
  Row found;
  found.word = load(w.mask + at + word);
  found.start = load(w.starts + at + word);
  found.offset = load(offset);
  if (first + WORDS < w.words)
    found.last = load(w.starts + at + first + WORDS);
  else
    found.last = load(offset + w.offset_stride);
  return found;
}

// Start to copy the values of a row to shared memory; returns where they will be.
DEVICE Place fetch(const Matrix &w, const Row &row, bool exists, int first, uint32_t to,
                   int pitch, int lane) {
  const int t = lane & 3;
  const uint32_t start = shuffle(row.start, lane & ~3);  // of the tile
  const uint32_t begin = row.offset + start;
  const uint32_t end = first + WORDS < w.words ? row.offset + row.last : row.last;
  const uint32_t skew = 2 * begin & 15, size = skew + 2 * (end - begin);
  const uint8_t *from = (const uint8_t *)w.values + (2ull * begin - skew) + 16 * t;
  uint8_t *target = shared_memory() + to + 16 * t;
#pragma unroll
  for (int k = 0; k < 320; k += 64) copy_async_if(16 * t + k < size, target + k, from + k);
  for (int k = 320; k < pitch; k += 64)
    copy_async_if(16 * t + k < size, target + k, from + k);
  const uint64_t word = exists && first + t < w.words ? row.word : 0;
  return {word, to + skew + 2 * (row.start - start)};
}

// Table by 4 bits of the mask: selectors of `permute` for columns 0, 1 and, in the upper
// half, 2, 3. The operands are the next 4 values; the last is 0 if fewer are taken.
DEVICE uint32_t selectors(uint32_t bits) {
  uint32_t found = 0, next = 0;
  for (int column = 0; column < 4; ++column) {
    const uint32_t value = bits >> column & 1 ? next++ : 3;
    found |= (2 * value | (2 * value + 1) << 4) << 8 * column;
  }
  return found;
}

// The weights of 4 columns, with their zeros, 16 bits each.
struct Four {
  uint32_t low, high;
};

// Args: offset of the values of the half word `mask`; `below`: bits before the columns;
// `bits`: the mask of the columns themselves; `table`: offset of the selectors.
DEVICE Four decode(uint32_t at, uint32_t mask, uint32_t below, uint32_t bits,
                   uint32_t table) {
  const uint32_t place = at + 2 * popcount(mask & below), aligned = place & ~3u;
  const uint32_t count = popcount(bits), size = 2 * count + (place & 2);
  // Up to three words of 32 bits hold the values.
  const uint32_t a = load_shared(aligned);
  uint32_t b = 0, c = 0;
  if (size > 4) b = load_shared(aligned + 4);
  if (size > 8) c = load_shared(aligned + 8);
  const uint32_t low = shift_wrap(a, b, 8 * place);
  uint32_t high = shift_wrap(b, c, 8 * place);
  if (count < 4) high &= 0xffff;
  const uint32_t selector = load_shared(table + 4 * bits);
  return {permute(low, high, selector), permute(low, high, selector >> 16)};
}

typedef uint32_t Inputs[WORDS][4][N_TILES][2];  // of each word, step of 16 columns, tile

DEVICE void multiply(const Place &place_a, const Place &place_b, const Inputs &x,
                     float (&sums)[N_TILES][4], uint32_t table, int lane) {
  const int t = lane & 3, quad = lane & ~3;
#pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    const int from = quad | word;
    uint32_t at_a = shuffle(place_a.at, from), at_b = shuffle(place_b.at, from);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t a = shuffle((uint32_t)(place_a.word >> 32 * half), from);
      const uint32_t b = shuffle((uint32_t)(place_b.word >> 32 * half), from);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int bit = 16 * step + 4 * t;
        const uint32_t below = (1u << bit) - 1;
        const Four four_a = decode(at_a, a, below, a >> bit & 15, table);
        const Four four_b = decode(at_b, b, below, b >> bit & 15, table);
        const uint32_t weights[4] = {four_a.low, four_b.low, four_a.high, four_b.high};
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
          const uint32_t *inputs = x[word][2 * half + step][n];
          mma(sums[n], weights, inputs[0], inputs[1]);
        }
      }
      at_a += 2 * popcount(a);
      at_b += 2 * popcount(b);
    }
  }
}

DEVICE void read_inputs(Inputs &x, const uint16_t *from, int samples, int columns,
                        int chunk, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int word = 0; word < WORDS; ++word)
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int sample = 8 * n + g;
          const int column = chunk * COLUMNS + 64 * word + 16 * step + 4 * t + 2 * pair;
          // The number of columns is even, so that both are there, or neither.
          const bool there = sample < samples && column < columns;
          x[word][step][n][pair] =
              there ? load((const uint32_t *)(from + (long long)sample * columns + column))
                    : 0;
        }
}

// Add the sums of all warps, which have different columns, by the warp `adding`; y, or a
// part of it, is written.
DEVICE void store(const float (&sums)[N_TILES][4], float *shared, const uint16_t *bias,
                  uint16_t *y, float *parts, const Matrix &w, int samples, int tile,
                  int adding) {
  const int lane = lane_id(), g = lane >> 2, t = lane & 3, warps = threads() >> 5;
  constexpr int SIZE = ROWS * SAMPLES;  // [ROWS, SAMPLES] of each warp
  float *own = shared + warp_id() * SIZE;
#pragma unroll
  for (int n = 0; n < N_TILES; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *(float2 *)(own + (g + 8 * half) * SAMPLES + 8 * n + 2 * t) =
          float2{sums[n][2 * half], sums[n][2 * half + 1]};
  sync_block();
  if (warp_id() != adding) return;
  float total[SIZE / 32] = {};
  constexpr int EACH = SIZE / 32;  // neighbouring numbers of a lane
#pragma unroll 8
  for (int warp = 0; warp < warps; ++warp)
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
      const float4 four = *(const float4 *)(shared + warp * SIZE + lane * EACH + i);
      total[i] += four.x, total[i + 1] += four.y;
      total[i + 2] += four.z, total[i + 3] += four.w;
    }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int row = tile * ROWS + (lane * EACH + i) / SAMPLES;
    const int sample = (lane * EACH + i) % SAMPLES;
    if (row >= w.rows || sample >= samples) continue;
    const long long place = (long long)sample * w.rows + row;
    if (parts)
      parts[(long long)block_y() * samples * w.rows + place] = total[i];
    else
      y[place] = narrow(bias ? total[i] + widen(bias[row]) : total[i]);
  }
}

// Arguments: `pitch`: bytes of shared memory for the values of a row of a tile, an odd
// multiple of 16, so that neighbouring rows are in different banks.
extern "C"
#ifndef EMULATED
    __global__ void __launch_bounds__(32 * MAX_WARPS)
#else
    void
#endif
        halve_few(const uint16_t *values, const uint64_t *mask, const uint16_t *starts,
                  const uint32_t *offsets, int offset_stride, int rows, int words,
                  int pitch, const uint16_t *x, const uint16_t *bias, uint16_t *y,
                  float *parts, int samples, int columns) {
  const Matrix w = {values, mask, starts, offsets, offset_stride, rows, words};
  const int lane = lane_id(), warps = threads() >> 5, g = lane >> 2, t = lane & 3;
  const int chunk = block_y() * warps + warp_id(), first = chunk * WORDS;
  const int tiles = (rows + ROWS - 1) / ROWS, next = blocks_x();
  const bool works = first < words;  // else it waits for the sums only
  const uint32_t stage_size = ROWS * pitch;
  float *buffers = (float *)(shared_memory() + 64);  // behind the table
  const int buffer_size = warps * ROWS * SAMPLES;
  const uint32_t stages =
      64 + 8 * buffer_size + (STAGES * warp_id() * ROWS + g) * pitch;
  if (thread_id() < 16) ((uint32_t *)shared_memory())[thread_id()] = selectors(thread_id());
  sync_block();
  Inputs inputs;
  read_inputs(inputs, x, samples, columns, chunk, lane);
  // Tiles past the last are neither read nor copied: all warps would do that at the same
  // address, one after the other.
  int tile = block_x(), row = tile * ROWS + g, adding = 0;
  Row row_a = {}, row_b = {};
  Place a = {}, b = {};
  if (works) {
    row_a = read_row(w, row, first, t);
    row_b = read_row(w, row + 8, first, t);
    a = fetch(w, row_a, row < rows, first, stages, pitch, lane);
    b = fetch(w, row_b, row + 8 < rows, first, stages + 8 * pitch, pitch, lane);
    if (tile + next < tiles) {
      row_a = read_row(w, row + next * ROWS, first, t);
      row_b = read_row(w, row + next * ROWS + 8, first, t);
    }
  }
  commit();
  for (int turn = 0; tile < tiles; tile += next, ++turn) {
    Place next_a = {}, next_b = {};
    const int stage = turn & 1;
    row += next * ROWS;
    if (works && tile + next < tiles) {
      const uint32_t to = stages + (stage ^ 1) * stage_size;
      next_a = fetch(w, row_a, row < rows, first, to, pitch, lane);
      next_b = fetch(w, row_b, row + 8 < rows, first, to + 8 * pitch, pitch, lane);
      if (tile + 2 * next < tiles) {
        row_a = read_row(w, row + next * ROWS, first, t);
        row_b = read_row(w, row + next * ROWS + 8, first, t);
      }
    }
    commit();
    wait<1>();
    sync_warp();
    float sums[N_TILES][4] = {};
    if (works) multiply(a, b, inputs, sums, 0, lane);
    // Two buffers in turn, so that one barrier is enough.
    store(sums, buffers + stage * buffer_size, bias, y, parts, w, samples, tile, adding);
    adding = adding + 1 < warps ? adding + 1 : 0;
    a = next_a;
    b = next_b;
  }
}

// y = the sum of all parts, [splits, samples, rows], and the bias.
extern "C"
#ifndef EMULATED
    __global__ void
#else
    void
#endif
        halve_few_sum(const float *parts, const uint16_t *bias, uint16_t *y, int splits,
                      int samples, int rows) {
  const int i = block_x() * threads() + thread_id(), all = samples * rows;
  if (i >= all) return;
  float sum = bias ? widen(bias[i % rows]) : 0.0f;
  for (int split = 0; split < splits; ++split) sum += parts[(long long)split * all + i];
  y[i] = narrow(sum);
}
