// Vectors of sixteen floats for AVX-512. See vec_portable.h for what each name means.
// LORAPLEX_DPBF16 1: dot products of bf16 by one instruction.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "compact.h"
#include "isa.h"
#include "open_avx512.h"

#define LORAPLEX_COMPACT 1  // reads compact rows

namespace loraplex {
namespace {

using bf16 = uint16_t;
using vf = __m512;

constexpr int kWidth = 16;
constexpr int kAccumulators = 16;

struct Block {
    vf lo, hi;
};

inline vf vzero() { return _mm512_setzero_ps(); }
inline vf vset(float value) { return _mm512_set1_ps(value); }
inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }

inline Block split(__m512i both) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))};
}

inline __mmask16 first_of_16(int64_t n) {
    return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}
inline __mmask32 first_of_32(int64_t n) {
    return n >= 32 ? 0xffffffffu : static_cast<__mmask32>((1u << n) - 1);
}

inline Block load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + kWidth)}; }
inline Block load(const bf16* p) { return split(_mm512_loadu_si512(p)); }
inline Block load_part(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(first_of_16(n), p),
            _mm512_maskz_loadu_ps(first_of_16(n - kWidth), p + kWidth)};
}
inline Block load_part(const bf16* p, int64_t n) {
    return split(_mm512_maskz_loadu_epi16(first_of_32(n), p));
}

inline __m512i quiet_nans(vf value, __m512i upper_half) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(upper_half, is_nan, _mm512_set1_epi32(0x7fc00000));
}

// Rounded to the nearest, or the even one, both halves at once.
LORAPLEX_ALWAYS_INLINE __m512i join(Block block) {
    __m512i lo = _mm512_castps_si512(block.lo), hi = _mm512_castps_si512(block.hi);
    if (__builtin_expect(_mm512_cmp_ps_mask(block.lo, block.hi, _CMP_UNORD_Q), 0)) {
        lo = quiet_nans(block.lo, lo);
        hi = quiet_nans(block.hi, hi);
    }
    constexpr __mmask32 kOdd = 0xaaaaaaaau;
    const __m512i kept = _mm512_mask_mov_epi16(_mm512_srli_epi32(lo, 16), kOdd, hi);
    const __m512i cut = _mm512_mask_mov_epi16(lo, kOdd, _mm512_slli_epi32(hi, 16));
    // Bit 15 of the average is the carry of cut + 0x7fff + (kept & 1).
    const __m512i half = _mm512_ternarylogic_epi32(kept, _mm512_set1_epi16(1),
                                                   _mm512_set1_epi16(0x7ffe), 0xea);
    return _mm512_add_epi16(kept, _mm512_srli_epi16(_mm512_avg_epu16(cut, half), 15));
}

inline void store(float* p, Block block) {
    _mm512_storeu_ps(p, block.lo);
    _mm512_storeu_ps(p + kWidth, block.hi);
}
inline void store(bf16* p, Block block) { _mm512_storeu_si512(p, join(block)); }
inline void store_part(float* p, Block block, int64_t n) {
    _mm512_mask_storeu_ps(p, first_of_16(n), block.lo);
    _mm512_mask_storeu_ps(p + kWidth, first_of_16(n - kWidth), block.hi);
}
inline void store_part(bf16* p, Block block, int64_t n) {
    _mm512_mask_storeu_epi16(p, first_of_32(n), join(block));
}

// What a dot product reads: raw bf16 pairs where one instruction multiplies them, else floats.
template <typename T>
struct OperandOf {
    using type = Block;
    static type full(const T* p) { return load(p); }
    static type part(const T* p, int64_t n) { return load_part(p, n); }
};
inline vf dot(vf acc, Block a, Block b) { return vfma(a.hi, b.hi, vfma(a.lo, b.lo, acc)); }

#if LORAPLEX_DPBF16
inline __m512i operand_of(__m512i raw) { return raw; }
template <>
struct OperandOf<bf16> {
    using type = __m512i;
    static type full(const bf16* p) { return _mm512_loadu_si512(p); }
    static type part(const bf16* p, int64_t n) {
        return _mm512_maskz_loadu_epi16(first_of_32(n), p);
    }
};
inline vf dot(vf acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
inline Block operand_of(__m512i raw) { return split(raw); }
#endif

template <typename T>
using Operand = typename OperandOf<T>::type;
template <typename T>
inline Operand<T> load_operand(const T* p) {
    return OperandOf<T>::full(p);
}
template <typename T>
inline Operand<T> load_operand_part(const T* p, int64_t n) {
    return OperandOf<T>::part(p, n);
}

// The rows of a group, by their tables.
struct RawGroup {
    RawPair rows[kGroupRows];

    RawGroup(const char* group, const __m512i* tables) {
        const __m512i places = _mm512_loadu_si512(group);
        rows[0] = open_row(_mm512_loadu_si512(group + 64), places, tables[0]);
        rows[1] = open_row(_mm512_loadu_si512(group + 128), _mm512_srli_epi16(places, 4), tables[1]);
    }
    void store(int row, bf16* values) const {
        _mm512_storeu_si512(values, rows[row].first);
        _mm512_storeu_si512(values + kGroup / 2, rows[row].second);
    }
};

LORAPLEX_ALWAYS_INLINE __m128 fold(vf v) {
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// (v0 + v1) + (v2 + v3) of the four lanes of each folded vector; `reduce` adds in the same order.
LORAPLEX_ALWAYS_INLINE void reduce4(const vf* v, float* out) {
    __m128 a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
}

LORAPLEX_ALWAYS_INLINE float reduce(vf v) {
    alignas(16) float f[4];
    _mm_store_ps(f, fold(v));
    return (f[0] + f[1]) + (f[2] + f[3]);
}

inline void prefetch(const void* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace loraplex
