// Rank rows of bfloat16 in twelve bits a value and without loss: the exponents of a row are few.
//
// Rows stand in blocks of eight, the last block of a page may have fewer. A block is a table of sixteen
// exponents (bits 14 … 7 of a value) for each of its rows, one byte each, then the groups: 64 values of
// the first row, of the second, …, the next 64 of the first. So rows are read side by side, and memory
// in one stream, which is easily fetched ahead. In a group, bytes 2j and 2j + 1 hold sign and mantissa
// (bits 15 and 6 … 0) of values j and 32 + j; the half bytes of byte 64 + j, low first, hold the places
// of their exponents in the table. `compact.py` decides which pages are kept so.
#pragma once

#include <cstdint>

namespace loraplex {

constexpr int64_t kCompact = 1;  // set in an offset of a page table: the page there is compact
constexpr int64_t kBlockRows = 8;
constexpr int64_t kTableBytes = 16;
constexpr int64_t kGroup = 64;
constexpr int64_t kGroupBytes = 96;

namespace {

// Of a block, by its rows.
inline int64_t compact_row_bytes(int64_t width) { return kTableBytes + width / kGroup * kGroupBytes; }

inline int64_t block_rows(int64_t n_rows, int64_t first) {
    return n_rows - first < kBlockRows ? n_rows - first : kBlockRows;
}

inline void open_group(const uint8_t* table, const uint8_t* group, uint16_t* values) {
    for (int j = 0; j < 32; ++j) {
        const uint8_t places = group[64 + j], both[2] = {table[places & 15], table[places >> 4]};
        for (int half = 0; half < 2; ++half) {
            const uint8_t rest = group[2 * j + half];
            values[32 * half + j] = static_cast<uint16_t>((rest & 0x80) << 8 | both[half] << 7 | (rest & 0x7f));
        }
    }
}

}  // namespace
}  // namespace loraplex
