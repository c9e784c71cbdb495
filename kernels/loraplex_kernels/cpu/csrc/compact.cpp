// Writes compact rows. See compact.h.
#include "compact.h"

#include <cstring>
#include <vector>

#include "isa.h"

namespace loraplex {
namespace {

// Row `row` of a pair on a stretch of `n` columns. Its groups, `group_step` apart, are zero where this
// row's places go. False if it has too many high bytes.
bool write_stretch(const uint16_t* values, int64_t n, int row, uint8_t* table, uint8_t* group,
                   int64_t group_step) {
    uint8_t place_of[256];
    if (!make_table(values, n, table, place_of)) return false;
    for (const uint16_t* end = values + n; values != end; values += kGroup, group += group_step)
        write_row(values, place_of, row, group);
    return true;
}

}  // namespace
}  // namespace loraplex

// `rows` [n_rows, width] of bfloat16, an even number of them and `width` a multiple of 64, to `compact`
// [n_rows · bytes of a row]; mixed first if `mixed`.
// Returns 0 and leaves `compact` in pieces if a row has more than sixteen high bytes in a stretch, else 1.
LORAPLEX_API int loraplex_compact_rows(const uint16_t* rows, int64_t n_rows, int64_t width,
                                       int64_t mixed, uint8_t* compact) {
    using namespace loraplex;
    std::vector<uint16_t> two(mixed ? 2 * width : 0);
    std::memset(compact, 0, n_rows * compact_row_bytes(width));
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t row = r % kBlockRows, first = r - row, n = block_rows(n_rows, first);
        uint8_t* block = compact + first * compact_row_bytes(width);
        const uint16_t* values = rows + r * width;
        if (mixed) {
            if (r % 2 == 0)
                mix_rows(width, width, [&](int64_t c, int64_t first, int64_t second) {
                    two[first] = values[c];
                    two[second] = values[width + c];
                });
            values = two.data() + r % 2 * width;
        }
        for (int64_t column = 0; column < width; column += kStretch) {
            const int64_t n_columns = width - column < kStretch ? width - column : kStretch;
            uint8_t* tables = block + n * compact_row_bytes(column);
            uint8_t* groups = tables + n * kTableBytes;
            if (!write_stretch(values + column, n_columns, static_cast<int>(row % kGroupRows),
                               tables + row * kTableBytes, groups + row / kGroupRows * kGroupBytes,
                               n / kGroupRows * kGroupBytes))
                return 0;
        }
    }
    return 1;
}
