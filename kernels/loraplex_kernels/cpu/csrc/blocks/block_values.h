// Single weights in blocks: reads them from GGUF's layout, writes and reads them in that of panels.
#pragma once

#include <cmath>
#include <cstring>

#include "blocks/block_formats.h"

namespace loraplex {
namespace {

constexpr int kUnitInputs = 256;  // at most

// The weights of one output in a unit.
struct BlockUnit {
    uint8_t codes[kUnitInputs];
    uint16_t d, m;
    uint8_t multiples[16];  // of d, for blocks or halves; of signed ones the bits
    uint8_t shift_multiples[8];
};

inline uint16_t read_half(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

inline void read_nibbles(const uint8_t* p, uint8_t* codes) {  // of 32 inputs
    for (int i = 0; i < 16; ++i) codes[i] = p[i] & 15, codes[16 + i] = p[i] >> 4;
}

inline void add_fifth_bits(const uint8_t* p, uint8_t* codes) {
    for (int i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>((p[i / 8] >> i % 8 & 1) << 4);
}

// Six-bit multiples of d and m of Q4_K and Q5_K.
inline void read_pairs_of_multiples(const uint8_t* p, BlockUnit& unit) {
    for (int i = 0; i < 4; ++i) {
        unit.multiples[i] = p[i] & 63;
        unit.shift_multiples[i] = p[i + 4] & 63;
        unit.multiples[i + 4] = static_cast<uint8_t>((p[i + 8] & 15) | p[i] >> 6 << 4);
        unit.shift_multiples[i + 4] = static_cast<uint8_t>(p[i + 8] >> 4 | p[i + 4] >> 6 << 4);
    }
}

inline void read_unit(const Q4_0*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p);
    read_nibbles(p + 2, unit.codes);
}
inline void read_unit(const IQ4_NL*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p);
    read_nibbles(p + 2, unit.codes);
}
inline void read_unit(const Q4_1*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p), unit.m = read_half(p + 2);
    read_nibbles(p + 4, unit.codes);
}
inline void read_unit(const Q5_0*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p);
    read_nibbles(p + 6, unit.codes);
    add_fifth_bits(p + 2, unit.codes);
}
inline void read_unit(const Q5_1*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p), unit.m = read_half(p + 2);
    read_nibbles(p + 8, unit.codes);
    add_fifth_bits(p + 4, unit.codes);
}
inline void read_unit(const Q8_0*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p);
    for (int i = 0; i < 32; ++i) unit.codes[i] = p[2 + i] ^ 128;  // plus 128
}
inline void read_unit(const Q3_K*, const uint8_t* p, BlockUnit& unit) {
    const uint8_t *high = p, *low = p + 32, *multiples = p + 96;
    unit.d = read_half(p + 108);
    for (int i = 0; i < 16; ++i) {
        const int nibble = i < 8 ? multiples[i] & 15 : multiples[i - 8] >> 4;
        const int top = multiples[8 + i % 4] >> 2 * (i / 4) & 3;
        unit.multiples[i] = static_cast<uint8_t>((nibble | top << 4) - 32);
    }
    for (int i = 0; i < 256; ++i) {
        const int part = i / 32, two = low[i / 128 * 32 + i % 32] >> 2 * (part % 4) & 3;
        unit.codes[i] = static_cast<uint8_t>(two | (high[i % 32] >> part & 1) << 2);
    }
}
inline void read_unit(const Q4_K*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p), unit.m = read_half(p + 2) ^ 0x8000;  // is subtracted there
    read_pairs_of_multiples(p + 4, unit);
    for (int i = 0; i < 256; ++i)
        unit.codes[i] = p[16 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
}
inline void read_unit(const Q5_K*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p), unit.m = read_half(p + 2) ^ 0x8000;
    read_pairs_of_multiples(p + 4, unit);
    for (int i = 0; i < 256; ++i) {
        const int low = p[48 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        unit.codes[i] = static_cast<uint8_t>(low | (p[16 + i % 32] >> i / 32 & 1) << 4);
    }
}
inline void read_unit(const Q6_K*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p + 208);
    for (int i = 0; i < 16; ++i) unit.multiples[i] = p[192 + i];
    for (int i = 0; i < 256; ++i) {
        const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
        const int low = p[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
        const int high = p[128 + half * 32 + l] >> 2 * quarter & 3;
        unit.codes[i] = static_cast<uint8_t>(low | high << 4);
    }
}
inline void read_unit(const IQ4_XS*, const uint8_t* p, BlockUnit& unit) {
    unit.d = read_half(p);
    const int high = read_half(p + 2);
    for (int b = 0; b < 8; ++b) {
        const int low = p[4 + b / 2] >> b % 2 * 4 & 15;
        unit.multiples[b] = static_cast<uint8_t>((low | (high >> 2 * b & 3) << 4) - 32);
        read_nibbles(p + 8 + b * 16, unit.codes + b * 32);
    }
}

// Bytes of a unit in a GGUF file.
inline int64_t unit_bytes(const Q4_0*) { return 18; }
inline int64_t unit_bytes(const IQ4_NL*) { return 18; }
inline int64_t unit_bytes(const Q4_1*) { return 20; }
inline int64_t unit_bytes(const Q5_0*) { return 22; }
inline int64_t unit_bytes(const Q5_1*) { return 24; }
inline int64_t unit_bytes(const Q8_0*) { return 34; }
inline int64_t unit_bytes(const Q3_K*) { return 110; }
inline int64_t unit_bytes(const Q4_K*) { return 144; }
inline int64_t unit_bytes(const Q5_K*) { return 176; }
inline int64_t unit_bytes(const Q6_K*) { return 210; }
inline int64_t unit_bytes(const IQ4_XS*) { return 136; }

// Writes the weights of output `lane` of a panel to a unit that is all zeros.
template <class F>
void write_unit(const BlockUnit& from, int64_t lane, uint8_t* unit) {
    std::memcpy(unit + lane * 2, &from.d, 2);
    if (F::kHasShift) std::memcpy(unit + F::kM + lane * 2, &from.m, 2);
    for (int64_t i = 0; F::kMultiplied && i < F::kBlocks * F::kParts; ++i)
        unit[F::kMultiplesOfD + i * kBlockPanel + lane] = from.multiples[i];
    for (int64_t b = 0; F::kMultiplied && F::kHasShift && b < F::kBlocks; ++b)
        unit[F::kMultiplesOfM + b * kBlockPanel + lane] = from.shift_multiples[b];
    for (int64_t k = 0; k < F::kBlocks * kBlockInputs; ++k) {
        uint8_t* block = unit + F::kCodes + k / kBlockInputs * F::kBlockBytes;
        const int64_t group = k % kBlockInputs / kGroupInputs;
        const int64_t i = lane * kGroupInputs + k % kGroupInputs;
        uint8_t* bytes = block + group * F::kGroupBytes;
        const uint8_t code = from.codes[k];
        if (F::kHasBytes) {
            bytes[i] = code;
            continue;
        }
        bytes[i % 64] |= static_cast<uint8_t>((code & 15) << i / 64 * 4);
        for (int plane = 0; plane < F::kPlanes; ++plane)
            block[kBlockGroups * F::kGroupBytes + plane * F::kPlaneBytes + group * 16 + i / 8] |=
                static_cast<uint8_t>((code >> (4 + plane) & 1) << i % 8);
    }
}

inline float half_value(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float size = exponent == 31  ? (mantissa ? __builtin_nanf("") : __builtin_inff())
                       : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                       : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return half & 0x8000 ? -size : size;
}

inline float read_number(const uint8_t* p, int64_t lane) {
    uint16_t half;
    std::memcpy(&half, p + lane * 2, 2);
    return half_value(half);
}

template <class F>
uint8_t read_code(const uint8_t* block, int64_t group, int64_t i) {
    const uint8_t* bytes = block + group * F::kGroupBytes;
    if (F::kHasBytes) return bytes[i];
    int code = bytes[i % 64] >> i / 64 * 4 & 15;
    for (int plane = 0; plane < F::kPlanes; ++plane) {
        const uint8_t* bits = block + kBlockGroups * F::kGroupBytes + plane * F::kPlaneBytes;
        code |= (bits[group * 16 + i / 8] >> i % 8 & 1) << (4 + plane);
    }
    return F::kLooksUp ? kIq4Codes[code] : static_cast<uint8_t>(code);
}

// Writes a block of 32 weights of output `lane`, each rounded to float32 as gguf-py does.
template <class F>
void read_block(const uint8_t* unit, int64_t b, int64_t lane, float* to) {
    const float d = read_number(unit, lane);
    const float m = F::kHasShift ? read_number(unit + F::kM, lane) : 0.0f;
    const uint8_t* block = unit + F::kCodes + b * F::kBlockBytes;
    float scales[2] = {d, d};
    for (int part = 0; F::kMultiplied && part < F::kParts; ++part) {
        const uint8_t byte = unit[F::kMultiplesOfD + (b * F::kParts + part) * kBlockPanel + lane];
        scales[part] = d * static_cast<float>(F::kIsSigned ? static_cast<int8_t>(byte) : byte);
    }
    const float shift =
        F::kMultiplied && F::kHasShift
            ? m * static_cast<float>(unit[F::kMultiplesOfM + b * kBlockPanel + lane])
            : m;
    for (int64_t k = 0; k < kBlockInputs; ++k) {
        const int64_t i = lane * kGroupInputs + k % kGroupInputs;
        const int code = read_code<F>(block, k / kGroupInputs, i) - F::kOffset;
        const float scaled = scales[F::kParts * k / kBlockInputs] * static_cast<float>(code);
        to[k] = F::kHasShift ? scaled + shift : scaled;
    }
}

}  // namespace
}  // namespace loraplex
