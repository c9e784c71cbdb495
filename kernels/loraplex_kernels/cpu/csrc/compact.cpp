// Writes compact rows. See compact.h.
#include "compact.h"

#include "isa.h"

namespace loraplex {
namespace {

bool write_row(const uint16_t* values, int64_t width, uint8_t* table, uint8_t* group,
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
            const uint16_t one = values[j], other = values[32 + j];
            group[2 * j] = static_cast<uint8_t>((one >> 8 & 0x80) | (one & 0x7f));
            group[2 * j + 1] = static_cast<uint8_t>((other >> 8 & 0x80) | (other & 0x7f));
            group[64 + j] = static_cast<uint8_t>(place[one >> 7 & 0xff] | place[other >> 7 & 0xff] << 4);
        }
    return true;
}

}  // namespace
}  // namespace loraplex

// `rows` [n_rows, width] of bfloat16, `width` a multiple of 64, to `compact` [n_rows · bytes of a row].
// Returns 0 and leaves `compact` in pieces if a row has more than sixteen exponents, else 1.
LORAPLEX_API int loraplex_compact_rows(const uint16_t* rows, int64_t n_rows, int64_t width,
                                       uint8_t* compact) {
    using namespace loraplex;
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t row = r % kBlockRows, first = r - row, n = block_rows(n_rows, first);
        uint8_t* block = compact + first * compact_row_bytes(width);
        if (!write_row(rows + r * width, width, block + row * kTableBytes,
                       block + n * kTableBytes + row * kGroupBytes, n * kGroupBytes))
            return 0;
    }
    return 1;
}
