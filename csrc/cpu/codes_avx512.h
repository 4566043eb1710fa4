// Reads codes of 2, 3, 4 or 8 bits, 64 at a time, as bytes: for CPUs with AVX-512 VBMI
// and VBMI2. Three instructions serve 2, 3 and 4 bits: vpermb brings to each eight
// bytes the bytes that hold their eight codes, vpmultishiftqb takes the codes out,
// wherever in a byte the first one begins, and `and` clears what is beside them. Those
// that belong to a mask are then spread by vpexpandb.

#ifndef HALVE_CODES_AVX512_H
#define HALVE_CODES_AVX512_H

#include <immintrin.h>

#include "in_register.h"
#include "quantized.h"

namespace {

// The operands of vpermb and vpmultishiftqb for codes of one width.
struct CodeTable {
  alignas(64) uint8_t bytes[64];
  // By the bit of a byte at which the first code begins.
  alignas(64) uint8_t shifts[8][64];
};

// Eight codes of b bits take b bytes, and begin within a byte: with b <= 4 they lie in
// the eight bytes from there, from which vpmultishiftqb selects any eight bits that
// follow each other. `doubled` selects each code from one bit earlier: twice the code,
// once the lowest bit is cleared. (For the first code that bit may be the last one of
// the eight bytes, where the instruction wraps around.)
constexpr CodeTable make_code_table(int bits, bool doubled) {
  CodeTable table{};
  for (int i = 0; i < 64; ++i) {
    table.bytes[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
    for (int first = 0; first < 8; ++first) {
      const int bit = i % 8 * bits + first + (doubled ? 63 : 0);
      table.shifts[first][i] = static_cast<uint8_t>(bit % 64);
    }
  }
  return table;
}

constexpr CodeTable code_tables[2][3] = {
    {make_code_table(2, false), make_code_table(3, false), make_code_table(4, false)},
    {make_code_table(2, true), make_code_table(3, true), make_code_table(4, true)}};

// Takes 64 codes out of a row. `doubled` doubles them, for zeros between two codes.
class Decoder {
 public:
  Decoder(int32_t bits, bool doubled)
      : table_(code_tables[doubled][bits < 8 ? bits - 2 : 0]),
        bytes_(_mm512_load_si512(table_.bytes)),
        keep_(in_register(_mm512_set1_epi8(((1 << bits) - 1) << doubled))) {}

  // Codes of fewer than 8 bits, from a bit of the row on.
  __m512i narrow(const uint8_t* row, uint64_t bit) const {
    const __m512i near = _mm512_loadu_si512(row + bit / 8);
    const __m512i eights = _mm512_permutexvar_epi8(bytes_, near);
    const __m512i shifts = _mm512_load_si512(table_.shifts[bit % 8]);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, eights), keep_);
  }

 private:
  const CodeTable& table_;
  __m512i bytes_, keep_;
};

// Writes bytes where `coded` has ones, and leaves `others` elsewhere.
inline __m512i spread(__m512i others, uint64_t coded, __m512i bytes) {
  return _mm512_mask_expand_epi8(others, coded, in_register(bytes));
}

// A mask of the lanes that are below `count`, which may be negative.
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff
                                : count > 0 ? (1 << count) - 1
                                            : 0);
}

// Fetches into the L2 cache: into L1, dense codes of 8 bits came at half the speed.
// Without, those of 8 bits take twice as long where four vectors are multiplied.
inline void prefetch_codes(const void* from, int64_t ahead) {
  __builtin_prefetch(static_cast<const char*>(from) + ahead, 0, 2);
}

constexpr int64_t codes_ahead = 4096;
constexpr int64_t code_mask_ahead = 1024;
constexpr int64_t code_line = 64;

// ---- Sources ----
// A source yields a row's codes as bytes: for each step `vectors` times 64, weights
// without a code as the code of zero. `ahead` is the distance at which codes are
// prefetched; 0: they are not. position() is where its next codes are.

// Dense codes of 2 and 4 bits need no shuffles: each byte of 64 holds 4 or 2 codes, and
// x is arranged in the order in which shifting these bytes yields them.
template <int bits>
class InterleavedCodes {
 public:
  static constexpr int64_t vectors = 8 / bits;
  static constexpr bool masked = false;

  void open(const halve_quantized& w, int64_t row, uint8_t* spare, int64_t ahead) {
    ahead_ = ahead;
    codes_ = codes_of(w, row, spare);
  }

  void begin_step(__m512i) {
    step_ = _mm512_loadu_si512(codes_);
    if (ahead_ != 0) prefetch_codes(codes_, ahead_);
    codes_ += sizeof(step_);
  }

  const uint8_t* position() const { return codes_; }

  // A shift of 16 bits carries bits of one byte into the other; `and` clears them.
  __m512i next(int64_t i, const Decoder&) const {
    const __m512i low = in_register(_mm512_set1_epi8((1 << bits) - 1));
    return _mm512_and_si512(_mm512_srli_epi16(step_, static_cast<unsigned>(i * bits)),
                            low);
  }

 private:
  const uint8_t* codes_;
  int64_t ahead_;
  __m512i step_;
};

// Dense codes of 3 or 8 bits.
template <int bits, int64_t vectors_>
class DenseCodes {
 public:
  static constexpr int64_t vectors = vectors_;
  static constexpr bool masked = false;

  void open(const halve_quantized& w, int64_t row, uint8_t* spare, int64_t ahead) {
    ahead_ = ahead;
    codes_ = codes_of(w, row, spare);
  }

  void begin_step(__m512i) {
    if (ahead_ == 0) return;
    prefetch_codes(codes_, ahead_);
    if (bits * vectors > 8) prefetch_codes(codes_, ahead_ + code_line);
  }

  const uint8_t* position() const { return codes_; }

  __m512i next(int64_t, const Decoder& decoder) {
    const uint8_t* codes = codes_;
    codes_ += 8 * bits;
    return bits == 8 ? _mm512_loadu_si512(codes) : decoder.narrow(codes, 0);
  }

 private:
  const uint8_t* codes_;
  int64_t ahead_;
};

// Codes with a mask. These loops are limited by the number of their instructions, so
// codes of 8 bits move a pointer, where others count bits, and the hardware prefetches
// the mask, which is read in order. It does not where the rows of a tile take turns.
template <int bits, int64_t vectors_>
class MaskedCodes {
 public:
  static constexpr int64_t vectors = vectors_;
  static constexpr bool masked = true;

  void open(const halve_quantized& w, int64_t row, uint8_t* spare, int64_t ahead) {
    ahead_ = ahead;
    codes_ = codes_of(w, row, spare);
    mask_ = mask_of(w, row);
    mask_end_ = mask_of(w, row + 1);
    bit_ = 0;
  }

  void begin_step(__m512i zeros) {
    zeros_ = zeros;
    if (ahead_ == 0) return prefetch_codes(mask_, code_mask_ahead);
    prefetch_codes(position(), ahead_);
    if (bits * vectors > 8) prefetch_codes(position(), ahead_ + code_line);
  }

  const uint8_t* position() const { return codes_ + bit_ / 8; }

  // A row of an odd number of words has none for the second half of its last step.
  __m512i next(int64_t, const Decoder& decoder) {
    if (vectors > 1 && mask_ == mask_end_) return zeros_;
    const uint64_t coded = read<uint64_t>(mask_, 0);
    const int64_t count = __builtin_popcountll(coded);
    mask_ += sizeof(coded);
    if (bits == 8) {
      const __m512i codes = _mm512_loadu_si512(codes_);
      codes_ += count;
      return spread(zeros_, coded, codes);
    }
    const __m512i codes = decoder.narrow(codes_, bit_);
    bit_ += bits * count;
    return spread(zeros_, coded, codes);
  }

 private:
  const uint8_t *codes_, *mask_, *mask_end_;
  int64_t ahead_;
  uint64_t bit_;
  __m512i zeros_;
};

}  // namespace

#endif
