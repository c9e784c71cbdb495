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

// The byte of a group with the place of a column's high byte; its low byte is byte `i ^ 1` of its row's.
inline int byte_of_column(int column) {
    return column < kGroup / 2 ? 2 * column + 1 : 2 * column - kGroup;
}

inline uint16_t read_value(const uint8_t* group, int row, const uint8_t* table, int column) {
    const int i = byte_of_column(column), place = group[i] >> 4 * row & 15;
    return static_cast<uint16_t>(table[place] << 8 | group[kGroup * (row + 1) + (i ^ 1)]);
}

// Writes a row of a group that is zero where the row's places go; `place_of` as `make_table` has it.
inline void write_row(const uint16_t* values, const uint8_t* place_of, int row, uint8_t* group) {
    for (int column = 0; column < kGroup; ++column) {
        const int i = byte_of_column(column), value = values[column];
        group[i] |= static_cast<uint8_t>(place_of[value >> 8] << 4 * row);
        group[kGroup * (row + 1) + (i ^ 1)] = static_cast<uint8_t>(value);
    }
}

// The high bytes of `values`, ascending and zeros behind them, and where in the table each of them is.
// False if they are more than a table holds.
inline bool make_table(const uint16_t* values, int64_t n, uint8_t* table, uint8_t* place_of) {
    bool seen[256] = {};
    for (int64_t i = 0; i < n; ++i) seen[values[i] >> 8] = true;
    int n_seen = 0;
    for (int high = 0; high < 256; ++high) {
        if (!seen[high]) continue;
        if (n_seen == kTableBytes) return false;
        place_of[high] = static_cast<uint8_t>(n_seen);
        table[n_seen++] = static_cast<uint8_t>(high);
    }
    while (n_seen < kTableBytes) table[n_seen++] = 0;
    return true;
}

// A group by the tables of its rows.
struct PlainGroup {
    const uint8_t *group, *tables;

    PlainGroup(const char* group, const char* tables)
        : group(reinterpret_cast<const uint8_t*>(group)),
          tables(reinterpret_cast<const uint8_t*>(tables)) {}
    void store(int row, uint16_t* values) const {
        for (int column = 0; column < kGroup; ++column)
            values[column] = read_value(group, row, tables + row * kTableBytes, column);
    }
};

}  // namespace
}  // namespace loraplex
