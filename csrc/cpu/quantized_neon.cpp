// Products with integer codes for 64-bit ARM, which follow those for AVX2, with tbl as
// the shuffle. Run under emulation only (qemu), never on an ARM machine.

#include <arm_neon.h>

#include "quantized_bytes.h"

namespace {

// How sixteen codes of a few bits become bytes: the byte in which each begins, shifted
// right, and the next one, shifted left. (A negative shift is one to the right.)
struct ByteTable {
  alignas(16) uint8_t low[16], high[16];
  alignas(16) int8_t right[16], left[16];
};

constexpr ByteTable make_byte_table(int bits) {
  ByteTable table{};
  for (int i = 0; i < 16; ++i) {
    const int bit = i * bits;
    table.low[i] = static_cast<uint8_t>(bit / 8);
    table.high[i] = static_cast<uint8_t>(bit / 8 + 1);
    table.right[i] = static_cast<int8_t>(-(bit % 8));
    table.left[i] = static_cast<int8_t>(8 - bit % 8);
  }
  return table;
}

template <int bits>
constexpr ByteTable byte_table = make_byte_table(bits);

struct Lanes {
  using Integers = int32x4x2_t;
  using Steps = int16x8x2_t;
  using Floats = float32x4x2_t;

  struct Half {
    static float to_float(uint16_t bits) {
      const float16x4_t halves = vreinterpret_f16_u16(vdup_n_u16(bits));
      return vgetq_lane_f32(vcvt_f32_f16(halves), 0);
    }
    static uint16_t from_float(float value) {
      const float16x4_t halves = vcvt_f16_f32(vdupq_n_f32(value));
      return vget_lane_u16(vreinterpret_u16_f16(halves), 0);
    }
  };

  template <int bits>
  static uint8x16_t sixteen(const uint8_t* codes) {
    const ByteTable& table = byte_table<bits>;
    const uint8x16_t near = vld1q_u8(codes);
    const uint8x16_t low =
        vshlq_u8(vqtbl1q_u8(near, vld1q_u8(table.low)), vld1q_s8(table.right));
    const uint8x16_t high =
        vshlq_u8(vqtbl1q_u8(near, vld1q_u8(table.high)), vld1q_s8(table.left));
    return vandq_u8(vorrq_u8(low, high), vdupq_n_u8((1 << bits) - 1));
  }

  template <int bits>
  static void unpack(const uint8_t* codes, uint8_t* out) {
    if constexpr (bits == 8) {
      std::memcpy(out, codes, 32);
    } else {
      vst1q_u8(out, sixteen<bits>(codes));
      vst1q_u8(out + 16, sixteen<bits>(codes + 2 * bits));
    }
  }

  static void double_codes(uint8_t* bytes) {
    for (int i = 0; i < 32; i += 16) {
      vst1q_u8(bytes + i, vshlq_n_u8(vld1q_u8(bytes + i), 1));
    }
  }

  static void spread(uint8_t* out, const uint8_t* bytes, const uint8_t* order,
                     uint8_t zero) {
    const uint8x16_t both = vcombine_u8(vld1_u8(bytes), vdup_n_u8(zero));
    vst1_u8(out, vqtbl1_u8(both, vld1_u8(order)));
  }

  static Integers no_integers() { return {{vdupq_n_s32(0), vdupq_n_s32(0)}}; }

  static Steps steps(const uint8_t* bytes, int32_t zero) {
    const uint8x16_t codes = vld1q_u8(bytes);
    const uint8x8_t zeros = vdup_n_u8(static_cast<uint8_t>(zero));
    return {{vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(codes), zeros)),
             vreinterpretq_s16_u16(vsubl_u8(vget_high_u8(codes), zeros))}};
  }

  static Integers dot(Integers sum, Steps steps, const int16_t* q) {
    for (int i = 0; i < 2; ++i) {
      const int16x8_t x = vld1q_s16(q + 8 * i), s = steps.val[i];
      sum.val[0] = vmlal_s16(sum.val[0], vget_low_s16(s), vget_low_s16(x));
      sum.val[1] = vmlal_high_s16(sum.val[1], s, x);
    }
    return sum;
  }

  static Floats no_floats() { return {{vdupq_n_f32(0), vdupq_n_f32(0)}}; }

  static Floats scaled(Floats sum, Integers integers, float scale) {
    for (int i = 0; i < 2; ++i) {
      sum.val[i] = vfmaq_n_f32(sum.val[i], vcvtq_f32_s32(integers.val[i]), scale);
    }
    return sum;
  }

  static float total(Floats sum) {
    return vaddvq_f32(vaddq_f32(sum.val[0], sum.val[1]));
  }

  // The code of zero is 0, never -0, whatever the scale is.
  static float32x4_t weights(uint16x4_t codes, int32_t zero, float scale) {
    const int32x4_t steps =
        vsubq_s32(vreinterpretq_s32_u32(vmovl_u16(codes)), vdupq_n_s32(zero));
    const uint32x4_t not_zero = vtstq_s32(steps, steps);
    const float32x4_t product = vmulq_n_f32(vcvtq_f32_s32(steps), scale);
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(product), not_zero));
  }

  // Rounds to nearest, ties to even, as bfloat16_from_float; a NaN is made quiet.
  static uint16x4_t to_bfloat16(float32x4_t v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), high = vshrq_n_u32(bits, 16);
    const uint32x4_t up =
        vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, up), 16);
    const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
    return vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet));
  }

  template <int32_t dtype>
  static void put_four(void* out, int64_t first, float32x4_t v) {
    auto* bytes = static_cast<uint8_t*>(out) + first * (dtype == HALVE_F32 ? 4 : 2);
    if constexpr (dtype == HALVE_F32) {
      vst1q_u8(bytes, vreinterpretq_u8_f32(v));
    } else if constexpr (dtype == HALVE_F16) {
      vst1_u8(bytes, vreinterpret_u8_f16(vcvt_f16_f32(v)));
    } else {
      vst1_u8(bytes, vreinterpret_u8_u16(to_bfloat16(v)));
    }
  }

  template <int32_t dtype>
  static void put(void* out, const uint8_t* bytes, int32_t zero, float scale) {
    const uint16x8_t codes = vmovl_u8(vld1_u8(bytes));
    put_four<dtype>(out, 0, weights(vget_low_u16(codes), zero, scale));
    put_four<dtype>(out, 4, weights(vget_high_u16(codes), zero, scale));
  }
};

}  // namespace

const halve::QuantizedKernel halve::neon_quantized_kernel = quantized_kernel_of<Lanes>;
