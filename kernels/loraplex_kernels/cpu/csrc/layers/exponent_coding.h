// bfloat16 in twelve bits a value, without loss: the layout of coded factors and weights.
//
// The upper byte of a value (its sign and all but the last bit of its exponent) is replaced by a
// four-bit *index* into a *codebook* of the at most sixteen upper bytes that occur among values that
// belong together. The lower byte stays.
//
// A *tile* is 64 values of each of two rows in three times 64 bytes: the indices, of the first row in
// the low half of a byte and of the second in the high half; the lower bytes of the first row; those
// of the second. Byte 2 j + 1 of the indices and byte 2 j of the lower bytes belong to value j < 32,
// the other way round they belong to value 32 + j. So of 64 looked-up upper bytes half stand where
// they belong, and the other half do once upper and lower bytes are moved by one (`decode_row` in
// simd/avx512.h).
//
// A *page* of factors (up to sixteen rank rows) is cut into blocks of eight rows. The last block may
// have fewer, but an even number. A block is one column block of 768 columns after the other: first
// a codebook for each of its rows, then the tiles: 64 columns of the first two rows, of the next two,
// …, the next 64 columns of the first two. So rows are read side by side and memory in one stream.
//
// A *panel* of weights (linear.inc) is cut into blocks of 32 words of k, that is 64 values of each of
// its 32 outputs, which share one codebook. All codebooks of a panel come first, padded to 64 bytes.
// Then come the blocks: sixteen tiles each, whose two rows are two words in a row, of 32 pairs each.
// A block with more than sixteen upper bytes stays plain; its codebook begins with 255 twice, which
// no other does, as codebooks ascend. In front of all panels stands where each of them starts, in
// bytes from there, and where the last one ends.
#pragma once

#include <cstdint>

namespace loraplex {

// Set in the offset of a page and in the address of panels, both otherwise even, where they are coded.
constexpr int64_t kCoded = 1;
constexpr int64_t kCodebookBytes = 16;
constexpr int64_t kTileColumns = 64;  // values of a row
constexpr int64_t kTileRows = 2;
constexpr int64_t kTileBytes = 192;
constexpr int64_t kBlockRows = 8;
constexpr int64_t kColumnBlock = 768;
constexpr int64_t kPanelOutputs = 32;
constexpr int64_t kBlockWords = 32;
constexpr int64_t kPlainBlockBytes = kBlockWords * kPanelOutputs * 4;
constexpr int64_t kCodedBlockBytes = kBlockWords / kTileRows * kTileBytes;

namespace {

// Returns the bytes of `width` columns of a coded row of factors.
inline int64_t coded_row_bytes(int64_t width) {
    return (width + kColumnBlock - 1) / kColumnBlock * kCodebookBytes +
           width / kTileColumns * (kTileBytes / kTileRows);
}

inline int64_t block_rows(int64_t n_rows, int64_t first) {
    return n_rows - first < kBlockRows ? n_rows - first : kBlockRows;
}

// The byte of a tile with the index of a column; its lower byte is byte `i ^ 1` of its row's.
inline int index_byte(int column) {
    return column < kTileColumns / 2 ? 2 * column + 1 : 2 * column - kTileColumns;
}

inline uint16_t decode_value(const uint8_t* tile, int row, const uint8_t* codebook, int column) {
    const int i = index_byte(column), index = tile[i] >> 4 * row & 15;
    return static_cast<uint16_t>(codebook[index] << 8 | tile[kTileColumns * (row + 1) + (i ^ 1)]);
}

// Rows of a coded page from row `first`, an even one, of `n_rows`, on one column block.
struct CodedBlock {
    const char* codebooks;
    const char* tiles;
    int64_t step;  // bytes from a tile to the one of the same rows and the next columns

    CodedBlock(const char* page, int64_t n_rows, int64_t first, int64_t width, int64_t column_block) {
        const int64_t row = first % kBlockRows, n = block_rows(n_rows, first - row);
        const char* block = page + (first - row) * coded_row_bytes(width) +
                            n * coded_row_bytes(column_block * kColumnBlock);
        codebooks = block + row * kCodebookBytes;
        tiles = block + n * kCodebookBytes + row / kTileRows * kTileBytes;
        step = n / kTileRows * kTileBytes;
    }
};

inline int64_t panel_codebook_bytes(int64_t n_words) {
    return (n_words / kBlockWords * kCodebookBytes + 63) / 64 * 64;
}

// Walks the blocks of a panel in order.
struct PanelBlock {
    const uint8_t* codebook;
    const uint8_t* words;

    PanelBlock(const char* panel, int64_t n_words)
        : codebook(reinterpret_cast<const uint8_t*>(panel)),
          words(codebook + panel_codebook_bytes(n_words)) {}
    bool is_plain() const { return codebook[0] == 255 && codebook[1] == 255; }
    void next() {
        words += is_plain() ? kPlainBlockBytes : kCodedBlockBytes;
        codebook += kCodebookBytes;
    }
    // The value in `column` of word `w`: of output column / 2, the even or odd one of a pair of k.
    uint16_t value(int64_t w, int column) const {
        if (is_plain()) return reinterpret_cast<const uint16_t*>(words)[w * kTileColumns + column];
        return decode_value(words + w / kTileRows * kTileBytes, static_cast<int>(w % kTileRows),
                            codebook, column);
    }
};

}  // namespace
}  // namespace loraplex
