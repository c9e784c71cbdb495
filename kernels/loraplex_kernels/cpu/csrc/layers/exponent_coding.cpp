// Writes coded pages and panels, and reads single outputs of panels. See exponent_coding.h.
#include "layers/exponent_coding.h"

#include <cstring>

#include "dispatch/cpu_features.h"

namespace loraplex {
namespace {

// The upper bytes of some values, and where in the codebook each of them is.
struct Codebook {
    uint8_t bytes[kCodebookBytes] = {};  // ascending, zeros behind them
    uint8_t index_of[256] = {};
    bool fits = true;  // false: they are too many

    Codebook(const uint16_t* values, int64_t n) {
        bool seen[256] = {};
        for (int64_t i = 0; i < n; ++i) seen[values[i] >> 8] = true;
        int n_seen = 0;
        for (int upper = 0; upper < 256 && fits; ++upper) {
            if (!seen[upper]) continue;
            fits = n_seen < kCodebookBytes;
            if (!fits) break;
            index_of[upper] = static_cast<uint8_t>(n_seen);
            bytes[n_seen++] = static_cast<uint8_t>(upper);
        }
    }

    // Writes 64 values as row 0 or 1 of a tile whose indices of that row are zero.
    void encode(const uint16_t* values, int row, uint8_t* tile) const {
        for (int column = 0; column < kTileColumns; ++column) {
            const int i = index_byte(column), value = values[column];
            tile[i] |= static_cast<uint8_t>(index_of[value >> 8] << 4 * row);
            tile[kTileColumns * (row + 1) + (i ^ 1)] = static_cast<uint8_t>(value);
        }
    }
};

// The bytes of a panel, coded where it can be; writes them unless `panel` is null.
int64_t encode_panel(const uint16_t* values, int64_t n_words, uint8_t* panel) {
    constexpr int64_t kBlockValues = kBlockWords * kTileColumns;
    int64_t n_bytes = panel_codebook_bytes(n_words);
    if (panel) std::memset(panel, 0, n_bytes);
    for (int64_t w = 0; w < n_words; w += kBlockWords, values += kBlockValues) {
        Codebook codebook(values, kBlockValues);
        if (!codebook.fits) codebook.bytes[0] = codebook.bytes[1] = 255;
        if (panel) {
            std::memcpy(panel + w / kBlockWords * kCodebookBytes, codebook.bytes, kCodebookBytes);
            uint8_t* words = panel + n_bytes;
            if (!codebook.fits) {
                std::memcpy(words, values, kPlainBlockBytes);
            } else {
                std::memset(words, 0, kCodedBlockBytes);
                for (int64_t i = 0; i < kBlockWords; ++i)
                    codebook.encode(values + i * kTileColumns, static_cast<int>(i % kTileRows),
                                    words + i / kTileRows * kTileBytes);
            }
        }
        n_bytes += codebook.fits ? kCodedBlockBytes : kPlainBlockBytes;
    }
    return n_bytes;
}

// A coded panel: the values of its 32 outputs, a row of 2 · n_words each, to `rows`. Faster than one
// output after the other, as a byte of indices serves two words.
void decode_panel(const char* panel, int64_t n_words, uint16_t* rows) {
    PanelBlock block(panel, n_words);
    for (int64_t first = 0; first < n_words; first += kBlockWords) {
        if (first > 0) block.next();
        for (int64_t w = 0; w < kBlockWords; w += kTileRows) {
            uint16_t* row = rows + 2 * (first + w);  // two words, of one output after the other
            if (block.is_plain()) {
                const uint16_t* values =
                    reinterpret_cast<const uint16_t*>(block.words) + w * kTileColumns;
                for (int o = 0; o < kPanelOutputs; ++o, row += 2 * n_words)
                    for (int k = 0; k < 2; ++k) {
                        row[k] = values[2 * o + k];
                        row[2 + k] = values[kTileColumns + 2 * o + k];
                    }
                continue;
            }
            const uint8_t* tile = block.words + w / kTileRows * kTileBytes;
            for (int o = 0; o < kPanelOutputs; ++o, row += 2 * n_words)
                for (int k = 0; k < 2; ++k) {
                    const int i = index_byte(2 * o + k), lower = kTileColumns + (i ^ 1);
                    const uint8_t* codebook = block.codebook;
                    row[k] = static_cast<uint16_t>(codebook[tile[i] & 15] << 8 | tile[lower]);
                    row[2 + k] = static_cast<uint16_t>(codebook[tile[i] >> 4] << 8 |
                                                       tile[kTileColumns + lower]);
                }
        }
    }
}

bool is_whole_panel(const int64_t* ids, int64_t n_ids) {
    if (n_ids < kPanelOutputs || ids[0] % kPanelOutputs != 0) return false;
    for (int64_t i = 1; i < kPanelOutputs; ++i)
        if (ids[i] != ids[0] + i) return false;
    return true;
}

}  // namespace
}  // namespace loraplex

// `rows` [n_rows, width] of bfloat16, an even number of them and `width` a multiple of 64, to `coded`
// [n_rows · bytes of a row]. Returns 0, and leaves `coded` unfinished, if a row has more than sixteen
// upper bytes in a column block, else 1.
LORAPLEX_API int loraplex_encode_rows(const uint16_t* rows, int64_t n_rows, int64_t width,
                                      uint8_t* coded) {
    using namespace loraplex;
    std::memset(coded, 0, n_rows * coded_row_bytes(width));
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t row = r % kBlockRows, first = r - row, n = block_rows(n_rows, first);
        uint8_t* block = coded + first * coded_row_bytes(width);
        for (int64_t column = 0; column < width; column += kColumnBlock) {
            const int64_t n_columns = width - column < kColumnBlock ? width - column : kColumnBlock;
            const uint16_t* values = rows + r * width + column;
            const Codebook codebook(values, n_columns);
            if (!codebook.fits) return 0;
            uint8_t* codebooks = block + n * coded_row_bytes(column);
            uint8_t* tile = codebooks + n * kCodebookBytes + row / kTileRows * kTileBytes;
            std::memcpy(codebooks + row * kCodebookBytes, codebook.bytes, kCodebookBytes);
            for (int64_t c = 0; c < n_columns; c += kTileColumns, tile += n / kTileRows * kTileBytes)
                codebook.encode(values + c, static_cast<int>(row % kTileRows), tile);
        }
    }
    return 1;
}

// Plain panels [n_panels, n_words, 32] of words, `n_words` a multiple of 32, to coded ones. Fills
// `starts` [n_panels + 1]; then, if `panels` is not null, writes the panels there, in front of which
// the caller puts `starts`.
LORAPLEX_API void loraplex_encode_panels(const uint32_t* words, int64_t n_panels, int64_t n_words,
                                         int64_t* starts, uint8_t* panels) {
    using namespace loraplex;
    const int64_t head = ((n_panels + 1) * static_cast<int64_t>(sizeof *starts) + 63) / 64 * 64;
    const uint16_t* const values = reinterpret_cast<const uint16_t*>(words);
    const int64_t n_values = n_words * kPanelOutputs * 2;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n_panels; ++i) {
        uint8_t* const panel = panels ? panels + starts[i] : nullptr;
        const int64_t n_bytes = encode_panel(values + i * n_values, n_words, panel);
        if (!panels) starts[i + 1] = n_bytes;
    }
    if (panels) return;
    starts[0] = head;
    for (int64_t i = 0; i < n_panels; ++i) starts[i + 1] += starts[i];
}

// Outputs `ids` [n_ids] of coded panels: their values to `rows` [n_ids, 2 · n_words].
LORAPLEX_API void loraplex_decode_outputs(const void* panels, int64_t n_words, const int64_t* ids,
                                          int64_t n_ids, uint16_t* rows) {
    using namespace loraplex;
    const int64_t* const starts = static_cast<const int64_t*>(panels);
    for (int64_t i = 0; i < n_ids; ++i, rows += 2 * n_words) {
        const char* const panel =
            static_cast<const char*>(panels) + starts[ids[i] / kPanelOutputs];
        if (is_whole_panel(ids + i, n_ids - i)) {
            decode_panel(panel, n_words, rows);
            i += kPanelOutputs - 1;
            rows += (kPanelOutputs - 1) * 2 * n_words;
            continue;
        }
        const int column = static_cast<int>(ids[i] % kPanelOutputs * 2);
        PanelBlock block(panel, n_words);
        for (int64_t w = 0; w < n_words; ++w) {
            if (w > 0 && w % kBlockWords == 0) block.next();
            rows[2 * w] = block.value(w % kBlockWords, column);
            rows[2 * w + 1] = block.value(w % kBlockWords, column + 1);
        }
    }
}
