// Single values of 16 bits, for all instruction sets. Included in an anonymous namespace.
//
// Rounding, here and in every header beside this one: to nearest, ties to even. A NaN stays a NaN
// with its sign and upper bits, and becomes quiet. Only hardware conversion (AVX512-BF16) takes
// subnormal numbers for zero.
#pragma once

typedef uint16_t bf16;

LORAPLEX_INLINE float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
LORAPLEX_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}
LORAPLEX_INLINE float to_float(bf16 x) { return from_bits(static_cast<uint32_t>(x) << 16); }
LORAPLEX_INLINE float to_float(float x) { return x; }
LORAPLEX_INLINE bf16 to_bf16(float x) {
    const uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
LORAPLEX_INLINE void store_value(bf16* p, float x) { *p = to_bf16(x); }
LORAPLEX_INLINE void store_value(float* p, float x) { *p = x; }
// A number of IEEE's 16 bits. A shift aligns exponent and mantissa, and the product corrects the
// exponent's bias, of subnormal numbers, too.
LORAPLEX_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(half & 0x7fffu) << 13;
    const float value = from_bits(rest) * from_bits((127u + 112u) << 23);
    const uint32_t infinite = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u | rest : to_bits(value);
    return from_bits(sign | infinite);
}
