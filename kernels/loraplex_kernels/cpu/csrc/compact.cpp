// Writes compact rows. See compact.h.
#include "compact.h"

#include "isa.h"

namespace loraplex {
namespace {

bool write_row(const uint16_t* values, int64_t width, uint8_t* row) {
    bool seen[256] = {};
    for (int64_t i = 0; i < width; ++i) seen[values[i] >> 7 & 0xff] = true;
    uint8_t place[256];
    int n = 0;
    for (int exponent = 0; exponent < 256; ++exponent) {
        if (!seen[exponent]) continue;
        if (n == kTableBytes) return false;
        place[exponent] = static_cast<uint8_t>(n);
        row[n++] = static_cast<uint8_t>(exponent);
    }
    while (n < kTableBytes) row[n++] = 0;
    uint8_t* group = row + kTableBytes;
    for (const uint16_t* end = values + width; values != end; values += kGroup, group += kGroupBytes)
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
    for (int64_t r = 0; r < n_rows; ++r)
        if (!loraplex::write_row(rows + r * width, width,
                                 compact + r * loraplex::compact_row_bytes(width)))
            return 0;
    return 1;
}
