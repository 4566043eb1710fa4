// Reads the scales and zeros of a row of codes, sixteen units at a time.

#ifndef HALVE_UNIT_SCALES_AVX512_H
#define HALVE_UNIT_SCALES_AVX512_H

#include "activations_avx512.h"

namespace {

// Of the units of a row, padded: scales times those of x, for each vector; the scales
// alone; and zeros as four equal bytes.
struct UnitScales {
  float* scales;    // [count][units]
  float* own;       // [units]
  uint32_t* zeros;  // [units]
};

// Reads the scales and zeros of sixteen units at a time: their groups are neighbours,
// and a group wider than a unit is repeated. Single reads would take half as long as
// the product. One reader serves all rows, because it begins with divisions.
class UnitReader {
 public:
  explicit UnitReader(const halve_quantized& w)
      : w_(w),
        groups_(groups_of(w)),
        width_(group_of(w) / unit_of(w)),
        zero_bytes_(zero_bytes_of(w)) {}

  void open(int64_t row) {
    scales_ = static_cast<const uint8_t*>(w_.scales) + 2 * row * groups_;
    zeros_ = static_cast<const uint8_t*>(w_.zeros) + row * zero_bytes_;
  }

  // The sixteen units from `unit` on. Units past the last group have a scale of 0.
  __m512 scales(int64_t unit) const {
    const int64_t group = group_before(unit);
    const __m256i halves =
        _mm256_maskz_loadu_epi16(first_lanes(groups_ - group), scales_ + 2 * group);
    return _mm512_permutexvar_ps(places(unit, group), _mm512_cvtph_ps(halves));
  }

  __m512i zeros(int64_t unit) const {
    const int64_t group = group_before(unit), bit = group * w_.bits;
    const __m128i bytes =
        _mm_maskz_loadu_epi8(first_lanes(zero_bytes_ - bit / 8), zeros_ + bit / 8);
    const __m512i codes = _mm512_cvtepu8_epi32(w_.bits == 8 ? bytes : take(bytes, bit));
    const __m512i placed = _mm512_permutexvar_epi32(places(unit, group), codes);
    return _mm512_mullo_epi32(placed, _mm512_set1_epi32(0x01010101));
  }

 private:
  int64_t group_before(int64_t unit) const {
    return smaller(width_ == 1 ? unit : unit / width_, groups_);
  }

  // The group of each unit, counted from `group`; below 16. Sixteen units lie in two
  // groups at most if a group has as many units.
  __m512i places(int64_t unit, int64_t group) const {
    const __m512i lane = _mm512_load_si512(counted);
    if (width_ == 1) return lane;
    const int64_t first = unit - group * width_;
    if (width_ >= lanes) {
      const __mmask16 next = static_cast<__mmask16>(~first_lanes(width_ - first));
      return _mm512_maskz_set1_epi32(next, 1);
    }
    const __m512 middle = _mm512_set1_ps(static_cast<float>(first) + 0.5f);
    const __m512 units = _mm512_add_ps(_mm512_cvtepi32_ps(lane), middle);
    const __m512 width = _mm512_set1_ps(static_cast<float>(width_));
    return _mm512_cvttps_epi32(_mm512_div_ps(units, width));
  }

  // The codes from a bit of the first byte on.
  __m128i take(__m128i bytes, int64_t bit) const {
    const CodeTable& table = code_tables[0][w_.bits - 2];
    const auto* order = reinterpret_cast<const __m128i*>(table.bytes);
    const auto* shifts = reinterpret_cast<const __m128i*>(table.shifts[bit % 8]);
    const __m128i eights = _mm_permutexvar_epi8(_mm_load_si128(order), bytes);
    const __m128i codes = _mm_multishift_epi64_epi8(_mm_load_si128(shifts), eights);
    return _mm_and_si128(codes, _mm_set1_epi8(static_cast<char>((1 << w_.bits) - 1)));
  }

  alignas(64) static constexpr int32_t counted[lanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                         8, 9, 10, 11, 12, 13, 14, 15};

  const halve_quantized& w_;
  int64_t groups_, width_, zero_bytes_;
  const uint8_t *scales_ = nullptr, *zeros_ = nullptr;
};

}  // namespace

#endif
