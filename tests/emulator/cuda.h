// Runs CUDA kernels on the CPU, with a thread for each thread of a block.
//
// It has what few.cu takes from CUDA: shuffles, barriers, copies to shared memory, the mma
// instruction m16n8k16. Lanes of a warp meet at every shuffle, as on a GPU. Copies happen
// at once, so that a missing wait is not found.
#pragma once

#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define EMULATED
#define DEVICE static inline

struct Warp {
  std::barrier<> barrier{32};
  uint32_t values[32];
  uint32_t a[32][4], b[32][2];
};

struct Block {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  int x, y, blocks_x, threads;
};

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

static thread_local Block *block;
static thread_local int thread;
alignas(16) static uint8_t shared[1 << 18];

DEVICE uint8_t *shared_memory() { return shared; }
DEVICE int lane_id() { return thread & 31; }
DEVICE int warp_id() { return thread >> 5; }
DEVICE int thread_id() { return thread; }
DEVICE int threads() { return block->threads; }
DEVICE int block_x() { return block->x; }
DEVICE int block_y() { return block->y; }
DEVICE int blocks_x() { return block->blocks_x; }
DEVICE Warp &warp() { return *block->warps[warp_id()]; }
DEVICE void sync_warp() { warp().barrier.arrive_and_wait(); }
DEVICE void sync_block() { block->barrier.arrive_and_wait(); }

DEVICE uint32_t shuffle(uint32_t value, int lane) {
  warp().values[lane_id()] = value;
  sync_warp();
  const uint32_t found = warp().values[lane & 31];
  sync_warp();
  return found;
}

DEVICE int popcount(uint32_t v) { return __builtin_popcount(v); }

// PTX's prmt: byte i of the result is the one that 4 bits of the selector name.
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i)
    found |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return found;
}

DEVICE uint32_t shift_wrap(uint32_t low, uint32_t high, uint32_t by) {
  return (uint32_t)(((uint64_t)high << 32 | low) >> (by & 31));
}

DEVICE void copy_async_if(bool condition, void *to, const void *from) {
  if (!condition) return;
  const uintptr_t offset = (uint8_t *)to - shared;
  if ((uintptr_t)from % 16 || offset % 16 || offset + 16 > sizeof shared) std::abort();
  std::memcpy(to, from, 16);
}
DEVICE void commit() {}
template <int PENDING> DEVICE void wait() {}

template <typename T> DEVICE T load(const T *p) {
  if ((uintptr_t)p % sizeof(T)) std::abort();
  return *p;
}

#if HALF
DEVICE float widen(uint16_t v) {
  _Float16 half;
  std::memcpy(&half, &v, 2);
  return half;
}
DEVICE uint16_t narrow(float f) {
  const _Float16 half = f;
  uint16_t v;
  std::memcpy(&v, &half, 2);
  return v;
}
#else
DEVICE float widen(uint16_t v) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
DEVICE uint16_t narrow(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}
#endif

// D[16, 8] += A[16, 16] B[16, 8]. Lane 4 g + t has rows g and g + 8 of A and of D, column
// g of B, and of 16 columns of A or rows of B those from 2t and from 2t + 8.
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Warp &w = warp();
  const int lane = lane_id(), g = lane >> 2, t = lane & 3;
  std::memcpy(w.a[lane], a, sizeof a);
  w.b[lane][0] = b0, w.b[lane][1] = b1;
  sync_warp();
  const auto half = [](uint32_t pair, int k) {
    return widen(k & 1 ? pair >> 16 : pair & 0xffff);
  };
  const auto lane_of = [](int row, int k) { return (row & 7) * 4 + (k & 7) / 2; };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i >> 1), column = 2 * t + (i & 1);
    for (int k = 0; k < 16; ++k)
      d[i] += half(w.a[lane_of(row, k)][(row >> 3) + 2 * (k >> 3)], k) *
              half(w.b[lane_of(column, k)][k >> 3], k);
  }
  sync_warp();
}

// Run a kernel for all blocks of a grid, one after the other.
template <typename Kernel>
static void launch(int grid_x, int grid_y, int threads, Kernel kernel) {
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; ++x) {
      std::memset(shared, 0xff, sizeof shared);
      Block one{std::barrier<>(threads), {}, x, y, grid_x, threads};
      for (int i = 0; i < threads / 32; ++i) one.warps.push_back(std::make_unique<Warp>());
      std::vector<std::thread> all;
      for (int i = 0; i < threads; ++i)
        all.emplace_back([&, i] { block = &one, thread = i, kernel(); });
      for (std::thread &each : all) each.join();
    }
}
