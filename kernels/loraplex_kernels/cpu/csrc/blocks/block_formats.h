// Weights in blocks of 32 inputs, as GGUF files have them, in panels of 32 outputs.
//
// A weight is scale · (code − offset), or scale · code + shift. A *unit* is one block, or several that
// share the numbers `d` and `m`: a block's scale is d, or d times a whole number of the block or of each
// half of it. Its shift is m, or m times a whole number.
//
// The parts of a unit, each for 32 outputs side by side:
//
//     d          numbers of 16 bits
//     m          the same, where weights have a shift
//     multiples  bytes [blocks, parts of a block, 32] of d, where there are any
//     multiples  bytes [blocks, 32] of m, likewise
//     codes      [blocks]: eight groups of four inputs. Code 4 · output + input of a group is a byte, or
//                the low (code < 64) or high half of byte code % 64. Bits 4 and 5 of six-bit codes
//                follow behind all groups of the block: 16 bytes a group for each of the two.
//
// In front of all panels stands for each of them where it starts, in bytes from there, plus its format,
// and where the last one ends. All parts begin at multiples of 64 bytes.
#pragma once

#include <cstdint>

namespace loraplex {

constexpr int64_t kInBlocks = 2;  // added to the address of such panels, as kCoded
constexpr int64_t kBlockInputs = 32;
constexpr int64_t kBlockPanel = 32;  // outputs
constexpr int64_t kGroupInputs = 4;
constexpr int64_t kBlockGroups = kBlockInputs / kGroupInputs;
constexpr int64_t kFormatMask = 63;  // of the starts of panels

// Where codes 0 to 15 of IQ4_NL and IQ4_XS stand, plus 128.
alignas(16) constexpr uint8_t kIq4Codes[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                               129, 141, 153, 166, 181, 197, 217, 241};

enum class Codes { kBytes, kNibbles, kFiveBits, kSixBits, kLookUp };
enum class Multiples { kNone, kBlock, kSignedBlock, kSignedHalf };

// `Offset`: a power of two that is subtracted from codes; 0 where a shift is added.
template <Codes C, int Blocks, Multiples M, int Offset>
struct BlockFormat {
    static constexpr bool kIsDecoded = false;
    static constexpr bool kHasBytes = C == Codes::kBytes;
    static constexpr bool kLooksUp = C == Codes::kLookUp;
    static constexpr int kPlanes = C == Codes::kSixBits ? 2 : C == Codes::kFiveBits ? 1 : 0;
    static constexpr int kBlocks = Blocks;
    static constexpr int kParts = M == Multiples::kSignedHalf ? 2 : 1;  // of a block
    static constexpr bool kMultiplied = M != Multiples::kNone;
    static constexpr bool kIsSigned = M != Multiples::kBlock;
    static constexpr int kOffset = Offset;
    static constexpr bool kHasShift = Offset == 0;

    static constexpr int64_t kM = kBlockPanel * 2;
    static constexpr int64_t kMultiplesOfD = kM + (kHasShift ? kM : 0);
    static constexpr int64_t kMultiplesOfM =
        kMultiplesOfD + (kMultiplied ? Blocks * kParts * kBlockPanel : 0);
    static constexpr int64_t kCodes =
        kMultiplesOfM + (kMultiplied && kHasShift ? Blocks * kBlockPanel : 0);
    static constexpr int64_t kGroupBytes = kHasBytes ? 128 : 64;
    static constexpr int64_t kPlaneBytes = kBlockGroups * 16;
    static constexpr int64_t kBlockBytes = kBlockGroups * kGroupBytes + kPlanes * kPlaneBytes;
    static constexpr int64_t kUnitBytes = kCodes + Blocks * kBlockBytes;
    static_assert(kCodes % 64 == 0 && kBlockBytes % 64 == 0, "vectors are aligned");
};

// The number of a format is that of GGUF's tensor type, and below 64.
#define LORAPLEX_BLOCK_FORMATS(X)                                                                  \
    X(2, Q4_0, Codes::kNibbles, 1, Multiples::kNone, 8)                                            \
    X(3, Q4_1, Codes::kNibbles, 1, Multiples::kNone, 0)                                            \
    X(6, Q5_0, Codes::kFiveBits, 1, Multiples::kNone, 16)                                          \
    X(7, Q5_1, Codes::kFiveBits, 1, Multiples::kNone, 0)                                           \
    X(8, Q8_0, Codes::kBytes, 1, Multiples::kNone, 128)                                            \
    X(11, Q3_K, Codes::kNibbles, 8, Multiples::kSignedHalf, 4)                                     \
    X(12, Q4_K, Codes::kNibbles, 8, Multiples::kBlock, 0)                                          \
    X(13, Q5_K, Codes::kFiveBits, 8, Multiples::kBlock, 0)                                         \
    X(14, Q6_K, Codes::kSixBits, 8, Multiples::kSignedHalf, 32)                                    \
    X(20, IQ4_NL, Codes::kLookUp, 1, Multiples::kNone, 128)                                        \
    X(23, IQ4_XS, Codes::kLookUp, 8, Multiples::kSignedBlock, 128)

#define LORAPLEX_FORMAT_ALIAS(number, name, ...) using name = BlockFormat<__VA_ARGS__>;
LORAPLEX_BLOCK_FORMATS(LORAPLEX_FORMAT_ALIAS)
#undef LORAPLEX_FORMAT_ALIAS

inline int64_t n_units(int64_t n_in, int64_t blocks) {
    return (n_in + kBlockInputs * blocks - 1) / (kBlockInputs * blocks);
}

// 32 inputs of a row in eight bits: x = scale · code.
struct XBlock {
    float scale;
    float sum;        // of x: scale · Σ code
    int32_t minus[3];  // −Σ code of the first half, of the second, and of all
};

// The rows of x of a product.
struct QuantizedRows {
    int8_t* codes;   // [n_rows, n_in]
    XBlock* blocks;  // [n_in / 32, n_rows]
    int64_t n_rows;
};

}  // namespace loraplex
