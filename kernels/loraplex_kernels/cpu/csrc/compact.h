// Rank rows of bfloat16 in twelve bits a value and without loss: the high bytes of a row are few.
//
// Rows stand in blocks of eight, the last block of a page may have fewer, but always a whole number of
// pairs. A block is one stretch of columns after the other. A stretch is a table of sixteen high bytes
// (sign and all but the last bit of the exponent) for each of its rows, then the groups: 64 values of the
// first two rows, of the next two, …, the next 64 of the first two. So rows are read side by side, and
// memory in one stream, which is easily fetched ahead.
//
// A group is three times 64 bytes. A byte of the first part holds two places in the tables, of the first
// row in its low bits, of the second above. The other parts are the low bytes of one row each. Byte
// 2 j + 1 of the places and byte 2 j of the low bytes are those of value j, the other way round they are
// those of value 32 + j. So of a row's 64 high bytes, in the order of the places, half stand where they
// belong, and the other half do once both, high and low bytes, are moved by one. Rows of Bᵀ are mixed
// before that, see `mix_rows`. `compact.py` decides which pages are kept so.
#pragma once

#include <cstdint>

namespace loraplex {

constexpr int64_t kCompact = 1;  // set in an offset of a page table: the page there is compact
constexpr int64_t kBlockRows = 8;
constexpr int64_t kTableBytes = 16;
constexpr int64_t kStretch = 768;  // columns that share their tables, at most
constexpr int64_t kGroup = 64;  // values of a row
constexpr int64_t kGroupRows = 2;
constexpr int64_t kGroupBytes = 192;

namespace {

// Of a block, or of its stretches on the first `width` columns, by its rows.
inline int64_t compact_row_bytes(int64_t width) {
    return (width + kStretch - 1) / kStretch * kTableBytes + width / kGroup * (kGroupBytes / kGroupRows);
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

// The column in its group whose high byte has its place in byte `i`; its low byte is byte `i ^ 1`.
inline int column_of_byte(int i) { return i % 2 ? i / 2 : kGroup / 2 + i / 2; }

// A group by the tables of its rows.
struct PlainGroup {
    const uint8_t *group, *tables;

    PlainGroup(const char* group, const char* tables)
        : group(reinterpret_cast<const uint8_t*>(group)),
          tables(reinterpret_cast<const uint8_t*>(tables)) {}
    void store(int row, uint16_t* values) const {
        const uint8_t *table = tables + row * kTableBytes, *low = group + kGroup * (row + 1);
        for (int i = 0; i < kGroup; ++i) {
            const int place = group[i] >> 4 * row & 15;
            values[column_of_byte(i)] = static_cast<uint16_t>(table[place] << 8 | low[i ^ 1]);
        }
    }
};

}  // namespace
}  // namespace loraplex
