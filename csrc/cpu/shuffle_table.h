// For instruction sets without an expand instruction: which of eight packed 16-bit
// weights goes to which of eight columns, for every byte of a mask. 4 KB, computed at
// compile time. Its rows are the indices of byte shuffles (pshufb, tbl).

#ifndef HALVE_SHUFFLE_TABLE_H
#define HALVE_SHUFFLE_TABLE_H

#include <cstdint>

namespace {

// Both shuffles write zero for this index: pshufb because its high bit is set, tbl
// because it is out of range.
constexpr uint8_t no_weight = 0x80;

struct ShuffleTable {
  alignas(64) uint8_t row[256][16];
};

constexpr ShuffleTable make_shuffle_table() {
  ShuffleTable table{};
  for (int mask = 0; mask < 256; ++mask) {
    uint8_t next = 0;
    for (int column = 0; column < 8; ++column) {
      const bool kept = (mask >> column) & 1;
      table.row[mask][2 * column] = kept ? next++ : no_weight;
      table.row[mask][2 * column + 1] = kept ? next++ : no_weight;
    }
  }
  return table;
}

constexpr ShuffleTable shuffle_table = make_shuffle_table();

}  // namespace

#endif
