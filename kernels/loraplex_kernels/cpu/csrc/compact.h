// Rank rows of bfloat16 in twelve bits a value and without loss: the exponents of a row are few.
//
// Rows stand in blocks of eight, the last block of a page may have fewer, but always a whole number of
// pairs. A block is a table of sixteen exponents (bits 14 … 7 of a value) for each of its rows, one byte
// each, then the groups: 64 values of the first two rows, of the next two, …, the next 64 of the first
// two. So rows are read side by side, and memory in one stream, which is easily fetched ahead.
//
// A group is three times 32 words of 16 bits. Word j of the first part holds four places in the tables,
// from its low bits on: of values j and 32 + j of the first row, then of the second. The other parts are
// sign and mantissa (bits 15 and 6 … 0) of one row each: bits 15 and 6 … 0 of word j are those of value j,
// and bits 7 and 14 … 8 those of value 32 + j, so that one mask serves the word and the word with its
// bytes swapped. Rows of Bᵀ are mixed before that, see `mix_rows`. `compact.py` decides which pages are
// kept so.
#pragma once

#include <cstdint>

namespace loraplex {

constexpr int64_t kCompact = 1;  // set in an offset of a page table: the page there is compact
constexpr int64_t kBlockRows = 8;
constexpr int64_t kTableBytes = 16;
constexpr int64_t kGroup = 64;  // values of a row
constexpr int64_t kGroupRows = 2;
constexpr int64_t kGroupBytes = 192;

namespace {

// Of a block, by its rows.
inline int64_t compact_row_bytes(int64_t width) {
    return kTableBytes + width / kGroup * (kGroupBytes / kGroupRows);
}

inline int64_t block_rows(int64_t n_rows, int64_t first) {
    return n_rows - first < kBlockRows ? n_rows - first : kBlockRows;
}

// Kernels take a column of two rank rows of Bᵀ at once, so each two rows are kept mixed. Of every 64
// columns the first mixed row has both rows' values in the left 32, the second those in the right 32; the
// even columns come first, and of a column the first row's value before the second's. Calls
// `place(column, to, to_second)` with where the two values of a column go; the second mixed row begins
// `apart` behind the first.
template <typename Place>
inline void mix_rows(int64_t n_columns, int64_t apart, const Place& place) {
    for (int64_t c = 0; c < n_columns; ++c) {
        const int64_t group = c / kGroup * kGroup, half = c % kGroup / 32, parity = c % 2;
        const int64_t to = half * apart + group + parity * 32 + c % 32 / 2 * 2;
        place(c, to, to + 1);
    }
}

// A group by the tables of its rows.
struct PlainGroup {
    const uint8_t *group, *tables;

    PlainGroup(const char* group, const char* tables)
        : group(reinterpret_cast<const uint8_t*>(group)),
          tables(reinterpret_cast<const uint8_t*>(tables)) {}
    int word(int64_t i) const { return group[2 * i] | group[2 * i + 1] << 8; }
    void store(int row, uint16_t* values) const {
        const uint8_t* table = tables + row * kTableBytes;
        for (int j = 0; j < 32; ++j) {
            const int places = word(j) >> 8 * row, rest = word(32 * (row + 1) + j);
            const int swapped = rest << 8 | rest >> 8;
            values[j] = static_cast<uint16_t>((rest & 0x807f) | table[places & 15] << 7);
            values[32 + j] = static_cast<uint16_t>((swapped & 0x807f) | table[places >> 4 & 15] << 7);
        }
    }
};

}  // namespace
}  // namespace loraplex
