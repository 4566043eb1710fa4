// Kernels for 64-bit ARM. They follow those for AVX2, with tbl as the shuffle and two
// registers of four float32 for eight columns. Run under emulation only (qemu), never
// on an ARM machine.

#include <arm_neon.h>

#include "bfloat16.h"
#include "generic.h"
#include "shuffle_table.h"
#include "step.h"

namespace {

inline uint8x16_t shuffle_of(uint64_t bits) {
  return vld1q_u8(shuffle_table.row[bits & 0xff]);
}

// Weights may be unaligned for their type, so they are loaded as bytes.
inline uint8x16_t load_bytes(const void* from) {
  return vld1q_u8(static_cast<const uint8_t*>(from));
}

inline void store_bytes(void* to, uint8x16_t bytes) {
  vst1q_u8(static_cast<uint8_t*>(to), bytes);
}

struct Float32 {
  using Stored = uint32_t;

  static float32x4x2_t widen(const Stored* from) {
    return {{vreinterpretq_f32_u8(load_bytes(from)),
             vreinterpretq_f32_u8(load_bytes(from + 4))}};
  }

  // Selects four of eight weights. A pair (2 n, 2 n + 1) of the table becomes the
  // indices of the four bytes 4 n ... 4 n + 3 of weight n; a pair without a weight
  // becomes four out-of-range indices, for which tbl writes zeros.
  static uint8x16_t pick(uint8x16x2_t eight, uint16x4_t pairs) {
    const uint32x4_t first = vandq_u32(vmovl_u16(pairs), vdupq_n_u32(0xff));
    const uint32x4_t absent = vcgeq_u32(first, vdupq_n_u32(no_weight));
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), first, 0x02020202);
    return vqtbl2q_u8(eight, vreinterpretq_u8_u32(vorrq_u32(bytes, absent)));
  }

  static uint8x16x2_t expand_bits(const Stored* from, uint64_t bits) {
    const uint16x8_t pairs = vreinterpretq_u16_u8(shuffle_of(bits));
    const uint8x16x2_t eight = {{load_bytes(from), load_bytes(from + 4)}};
    return {{pick(eight, vget_low_u16(pairs)), pick(eight, vget_high_u16(pairs))}};
  }

  static float32x4x2_t expand(const Stored* from, uint64_t bits) {
    const uint8x16x2_t spread = expand_bits(from, bits);
    return {{vreinterpretq_f32_u8(spread.val[0]), vreinterpretq_f32_u8(spread.val[1])}};
  }

  static void copy(Stored* to, const Stored* from, uint64_t bits) {
    const uint8x16x2_t spread = expand_bits(from, bits);
    store_bytes(to, spread.val[0]);
    store_bytes(to + 4, spread.val[1]);
  }

  static float to_float(Stored value) { return float_from_bits(value); }
  static Stored from_float(float value) { return bits_of(value); }
};

// Common code of both 16-bit dtypes; Dtype::widen_register converts eight to float32.
template <class Dtype>
struct Sixteen {
  using Stored = uint16_t;

  static uint8x16_t expand_bits(const Stored* from, uint64_t bits) {
    return vqtbl1q_u8(load_bytes(from), shuffle_of(bits));
  }

  static float32x4x2_t widen(const Stored* from) {
    return Dtype::widen_register(vreinterpretq_u16_u8(load_bytes(from)));
  }

  static float32x4x2_t expand(const Stored* from, uint64_t bits) {
    return Dtype::widen_register(vreinterpretq_u16_u8(expand_bits(from, bits)));
  }

  static void copy(Stored* to, const Stored* from, uint64_t bits) {
    store_bytes(to, expand_bits(from, bits));
  }
};

struct Float16 : Sixteen<Float16> {
  static float32x4x2_t widen_register(uint16x8_t v) {
    const float16x8_t halves = vreinterpretq_f16_u16(v);
    return {{vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))}};
  }

  static float to_float(Stored value) {
    const float16x4_t halves = vreinterpret_f16_u16(vdup_n_u16(value));
    return vgetq_lane_f32(vcvt_f32_f16(halves), 0);
  }

  static Stored from_float(float value) {
    const float16x4_t halves = vcvt_f16_f32(vdupq_n_f32(value));
    return vget_lane_u16(vreinterpret_u16_f16(halves), 0);
  }
};

struct Bfloat16 : Sixteen<Bfloat16> {
  static float32x4x2_t widen_register(uint16x8_t v) {
    return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(v), 16)),
             vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(v), 16))}};
  }

  static float to_float(Stored value) { return bfloat16_to_float(value); }
  static Stored from_float(float value) { return bfloat16_from_float(value); }
};

template <class Dtype>
struct Lanes : Dtype {
  using Element = float;
  using Vector = float32x4x2_t;
  using Sum = float32x4x2_t;
  static constexpr int64_t width = 8;
  static constexpr int64_t few = 4;
  static constexpr int64_t batch_tile = 2;

  static Sum zero() { return {{vdupq_n_f32(0), vdupq_n_f32(0)}}; }
  static Vector broadcast(float value) {
    return {{vdupq_n_f32(value), vdupq_n_f32(value)}};
  }
  static Vector load(const Element* from) {
    return {{vld1q_f32(from), vld1q_f32(from + 4)}};
  }
  static void store(Element* to, Vector v) {
    vst1q_f32(to, v.val[0]);
    vst1q_f32(to + 4, v.val[1]);
  }
  static Sum dot(Sum sum, Vector a, Vector b) {
    return {{vfmaq_f32(sum.val[0], a.val[0], b.val[0]),
             vfmaq_f32(sum.val[1], a.val[1], b.val[1])}};
  }
  static Sum add(Sum a, Sum b) {
    return {{vaddq_f32(a.val[0], b.val[0]), vaddq_f32(a.val[1], b.val[1])}};
  }
  static float total(Sum sum) { return vaddvq_f32(vaddq_f32(sum.val[0], sum.val[1])); }
  static void totals(const Sum* sums, float* out) {
    for (int64_t r = 0; r < tile_rows; ++r) out[r] = total(sums[r]);
  }
};

}  // namespace

const halve::Kernel halve::neon_kernels[dtype_count] = {
    kernel_of<Lanes<Float32>>, kernel_of<Lanes<Float16>>, kernel_of<Lanes<Bfloat16>>};

const halve::StepKernel halve::neon_step[dtype_count] = {
    step_of<Lanes<Float32>>, step_of<Lanes<Float16>>, step_of<Lanes<Bfloat16>>};
