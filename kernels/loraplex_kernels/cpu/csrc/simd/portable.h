// Vectors of four floats in GCC's vector extensions: SSE2 on x86-64, NEON on aarch64. This header
// says what each name means; the others have the same names for wider vectors.
#pragma once

#include "simd/scalar.h"

constexpr int kLanes = 4;
constexpr int kAccumulators = 8;  // vectors that a tile sums in, so that few registers spill
typedef float vf __attribute__((vector_size(16)));     // kLanes floats
typedef uint32_t vi __attribute__((vector_size(16)));  // kLanes words, or 2 · kLanes bfloat16

LORAPLEX_INLINE vf v_set(float x) { return vf{} + x; }
LORAPLEX_INLINE vf v_add(vf a, vf b) { return a + b; }
LORAPLEX_INLINE vf v_sub(vf a, vf b) { return a - b; }
LORAPLEX_INLINE vf v_mul(vf a, vf b) { return a * b; }
LORAPLEX_INLINE vf v_div(vf a, vf b) { return a / b; }
// a · b + c, rounded once where the processor can.
LORAPLEX_INLINE vf v_fma(vf a, vf b, vf c) {
#if defined(__FP_FAST_FMAF)
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}
LORAPLEX_INLINE vf v_max(vf a, vf b) { return a > b ? a : b; }  // b where one is a NaN
LORAPLEX_INLINE vf v_min(vf a, vf b) { return a < b ? a : b; }
LORAPLEX_INLINE vf v_round(vf x) {  // to the nearest integer
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_rintf(x[i]);
    return x;
}

// Words hold two bfloat16 each, the lower-indexed one in the low half (a VNNI pair).
LORAPLEX_INLINE vi v_words(const void* p) {
    vi x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
LORAPLEX_INLINE void v_store_words(void* p, vi x) { __builtin_memcpy(p, &x, sizeof x); }
LORAPLEX_INLINE vi v_word(uint32_t x) { return vi{} + x; }
LORAPLEX_INLINE vf v_as_floats(vi x) { return reinterpret_cast<vf>(x); }
LORAPLEX_INLINE vf v_low(vi x) { return reinterpret_cast<vf>(x << 16); }
LORAPLEX_INLINE vf v_high(vi x) { return reinterpret_cast<vf>(x & 0xffff0000u); }
// c + a.low · b.low + a.high · b.high in each word.
LORAPLEX_INLINE vf v_dot(vi a, vi b, vf c) {
    return v_fma(v_high(a), v_high(b), v_fma(v_low(a), v_low(b), c));
}
// x as bfloat16, in the upper half of each word; the lower half is undefined.
LORAPLEX_INLINE vi v_bf16_bits(vf x) {
    const vi bits = reinterpret_cast<vi>(x);
    const vi rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const vi is_nan = reinterpret_cast<vi>(x != x);
    return (rounded & ~is_nan) | ((bits | 0x400000u) & is_nan);
}
// `low` and `high` as bfloat16, in the halves of each word.
LORAPLEX_INLINE vi v_join(vf low, vf high) {
    return (v_bf16_bits(low) >> 16) | (v_bf16_bits(high) & 0xffff0000u);
}

// `low` and `high`, which are bfloat16 already, in the halves of each word.
LORAPLEX_INLINE vi v_join_exact(vf low, vf high) {
    return (reinterpret_cast<vi>(low) >> 16) | reinterpret_cast<vi>(high);
}

LORAPLEX_INLINE vf v_load(const float* p) { return v_as_floats(v_words(p)); }
LORAPLEX_INLINE void v_store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
LORAPLEX_INLINE vf v_load(const bf16* p) {
    vf x;
    for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
    return x;
}
LORAPLEX_INLINE void v_store(bf16* p, vf x) {
    const vi bits = v_bf16_bits(x);
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<bf16>(bits[i] >> 16);
}

// The first n lanes of x, the others replaced by `other`.
LORAPLEX_INLINE vf v_keep(vf x, int64_t n, vf other) {
    for (int i = 0; i < kLanes; ++i) x[i] = i < n ? x[i] : other[i];
    return x;
}
// x where `by` ≥ bound (or is a NaN), else 0.
LORAPLEX_INLINE vf v_clear_below(vf x, vf by, float bound) {
    for (int i = 0; i < kLanes; ++i) x[i] = by[i] < bound ? 0.0f : x[i];
    return x;
}
// Returns true if any lane is above `bound` or NaN.
LORAPLEX_INLINE bool v_any_above(vf x, float bound) {
    bool is_above = false;
    for (int i = 0; i < kLanes; ++i) is_above |= !(x[i] <= bound);
    return is_above;
}
// x · 2^n for integral |n| ≤ 128, in two steps, since 2^128 is no float.
LORAPLEX_INLINE float power2(int n) { return from_bits(static_cast<uint32_t>(n + 127) << 23); }
LORAPLEX_INLINE vf v_scale2(vf x, vf n) {
    for (int i = 0; i < kLanes; ++i) {
        const bool bad = !(n[i] >= -256.0f && n[i] <= 256.0f);
        const int whole = bad ? 0 : static_cast<int>(n[i]), half = whole / 2;
        x[i] = x[i] * power2(half) * power2(whole - half);
    }
    return x;
}

// Integers: a word is a 32-bit number, or four bytes.
LORAPLEX_INLINE vi v_shift_left(vi x, int n) { return x << n; }
LORAPLEX_INLINE vi v_low_nibbles(vi x) { return x & 0x0f0f0f0fu; }  // of each byte
LORAPLEX_INLINE vi v_high_nibbles(vi x) { return (x >> 4) & 0x0f0f0f0fu; }
LORAPLEX_INLINE vf v_byte(vi x, int i) {  // byte i of each word, as an unsigned number
    vf y;
    for (int j = 0; j < kLanes; ++j) y[j] = static_cast<float>((x[j] >> 8 * i) & 255);
    return y;
}
LORAPLEX_INLINE vf v_from_ints(vi x) {
    vf y;
    for (int i = 0; i < kLanes; ++i) y[i] = static_cast<float>(static_cast<int32_t>(x[i]));
    return y;
}
// sums + the products of four unsigned bytes and four signed ones, in each word; exact.
LORAPLEX_INLINE vi v_dot_bytes(vi codes, vi x, vi sums) {
    for (int i = 0; i < 4; ++i) {
        const vi byte = (codes >> 8 * i) & 255u;
        for (int j = 0; j < kLanes; ++j)
            sums[j] += byte[j] * static_cast<uint32_t>(static_cast<int8_t>(x[j] >> 8 * i));
    }
    return sums;
}
// x with `bit` set in the bytes whose bit at `bits` is set, the first byte's the lowest.
LORAPLEX_INLINE vi v_set_bits(vi x, const uint8_t* bits, uint8_t bit) {
    uint8_t bytes[kLanes * 4];
    __builtin_memcpy(bytes, &x, sizeof bytes);
    for (int i = 0; i < kLanes * 4; ++i)
        if (bits[i / 8] >> i % 8 & 1) bytes[i] |= bit;
    return v_words(bytes);
}
// table[b] for each byte b < 16 of x.
LORAPLEX_INLINE vi v_look_up(vi x, const uint8_t* table) {
    uint8_t bytes[kLanes * 4];
    __builtin_memcpy(bytes, &x, sizeof bytes);
    for (int i = 0; i < kLanes * 4; ++i) bytes[i] = table[bytes[i]];
    return v_words(bytes);
}
LORAPLEX_INLINE vf v_load_half(const uint16_t* p) {  // numbers of 16 bits
    vf x;
    for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i]);
    return x;
}
LORAPLEX_INLINE vf v_load_bytes(const uint8_t* p) {
    vf x;
    for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[i]);
    return x;
}
LORAPLEX_INLINE vf v_load_bytes(const int8_t* p) {
    vf x;
    for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[i]);
    return x;
}
// Stores whole numbers of -128 to 127.
LORAPLEX_INLINE void v_store_bytes(int8_t* p, vf x) {
    for (int i = 0; i < kLanes; ++i)
        p[i] = x[i] >= -128.0f && x[i] <= 127.0f ? static_cast<int8_t>(x[i]) : 0;
}

LORAPLEX_INLINE float v_first(vf x) { return x[0]; }
// The sum of the lanes, each with the one half a vector on, and so forth.
LORAPLEX_INLINE float v_sum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
LORAPLEX_INLINE float v_largest(vf x) {
    const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}
// The sum of the lanes: folded to four, of which neighbours are added first. Also of four vectors.
LORAPLEX_INLINE float v_fold(vf x) { return (x[0] + x[1]) + (x[2] + x[3]); }
LORAPLEX_INLINE void v_fold4(const vf* x, float* sums) {
    for (int i = 0; i < 4; ++i) sums[i] = v_fold(x[i]);
}

LORAPLEX_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
