// Writes compact rows. See compact.h.
#include "compact.h"

#include <cstring>
#include <vector>

#include "isa.h"

namespace loraplex {
namespace {

void put(uint8_t* word, int bits) {
    word[0] |= static_cast<uint8_t>(bits);
    word[1] |= static_cast<uint8_t>(bits >> 8);
}

// Row `row` of a pair, whose group, of zeros where this row's values go, is at `group`.
bool write_row(const uint16_t* values, int64_t width, int row, uint8_t* table, uint8_t* group,
               int64_t group_step) {
    bool seen[256] = {};
    for (int64_t i = 0; i < width; ++i) seen[values[i] >> 7 & 0xff] = true;
    uint8_t place[256];
    int n = 0;
    for (int exponent = 0; exponent < 256; ++exponent) {
        if (!seen[exponent]) continue;
        if (n == kTableBytes) return false;
        place[exponent] = static_cast<uint8_t>(n);
        table[n++] = static_cast<uint8_t>(exponent);
    }
    while (n < kTableBytes) table[n++] = 0;
    for (const uint16_t* end = values + width; values != end; values += kGroup, group += group_step)
        for (int j = 0; j < 32; ++j) {
            const int one = values[j], other = values[32 + j];
            const int places = place[one >> 7 & 0xff] | place[other >> 7 & 0xff] << 4;
            put(group + 2 * j, places << 8 * row);
            put(group + 64 * (row + 1) + 2 * j,
                (one & 0x807f) | (other & 0x7f) << 8 | (other >> 8 & 0x80));
        }
    return true;
}

}  // namespace
}  // namespace loraplex

// `rows` [n_rows, width] of bfloat16, an even number of them and `width` a multiple of 64, to `compact`
// [n_rows · bytes of a row]; mixed first if `mixed`.
// Returns 0 and leaves `compact` in pieces if a row has more than sixteen exponents, else 1.
LORAPLEX_API int loraplex_compact_rows(const uint16_t* rows, int64_t n_rows, int64_t width,
                                       int64_t mixed, uint8_t* compact) {
    using namespace loraplex;
    std::vector<uint16_t> two(mixed ? 2 * width : 0);
    std::memset(compact, 0, n_rows * compact_row_bytes(width));
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t row = r % kBlockRows, first = r - row, n = block_rows(n_rows, first);
        uint8_t* block = compact + first * compact_row_bytes(width);
        uint8_t* group = block + n * kTableBytes + row / kGroupRows * kGroupBytes;
        const uint16_t* values = rows + r * width;
        if (mixed) {
            if (r % 2 == 0)
                mix_rows(width, width, [&](int64_t c, int64_t first, int64_t second) {
                    two[first] = values[c];
                    two[second] = values[width + c];
                });
            values = two.data() + r % 2 * width;
        }
        if (!write_row(values, width, static_cast<int>(row % kGroupRows),
                       block + row * kTableBytes, group, n / kGroupRows * kGroupBytes))
            return 0;
    }
    return 1;
}
