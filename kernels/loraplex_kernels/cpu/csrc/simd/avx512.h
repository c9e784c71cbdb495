// Vectors of sixteen floats for AVX-512, and exponent-coded values in registers. See portable.h for
// what each name means. avx512bf16.h is this file with LORAPLEX_SIMD_BF16: conversions and dot
// products of bfloat16 and dot products of bytes (VNNI) in hardware, byte look-ups (VBMI) and funnel
// shifts (VBMI2).
#pragma once

#include "simd/scalar.h"

#define LORAPLEX_SIMD_DECODES 1  // has decode_row below

constexpr int kLanes = 16;
constexpr int kAccumulators = 16;
typedef __m512 vf;
typedef __m512i vi;

LORAPLEX_INLINE vf v_set(float x) { return _mm512_set1_ps(x); }
LORAPLEX_INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
LORAPLEX_INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
LORAPLEX_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
LORAPLEX_INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
LORAPLEX_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
LORAPLEX_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
LORAPLEX_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
LORAPLEX_INLINE vf v_round(vf x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

LORAPLEX_INLINE vi v_words(const void* p) { return _mm512_loadu_si512(p); }
LORAPLEX_INLINE void v_store_words(void* p, vi x) { _mm512_storeu_si512(p, x); }
LORAPLEX_INLINE vi v_word(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
LORAPLEX_INLINE vf v_as_floats(vi x) { return _mm512_castsi512_ps(x); }
LORAPLEX_INLINE vf v_low(vi x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
LORAPLEX_INLINE vf v_high(vi x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-0x10000)));
}
#if LORAPLEX_SIMD_BF16
LORAPLEX_INLINE vf v_dot(vi a, vi b, vf c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
LORAPLEX_INLINE __m256i v_to_bf16(vf x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
LORAPLEX_INLINE vi v_bf16_bits(vf x) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(v_to_bf16(x)), 16);
}
#else
LORAPLEX_INLINE vf v_dot(vi a, vi b, vf c) {
    return v_fma(v_high(a), v_high(b), v_fma(v_low(a), v_low(b), c));
}
LORAPLEX_INLINE vi v_bf16_bits(vf x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits,
                                _mm512_set1_epi32(0x400000));
}
LORAPLEX_INLINE __m256i v_to_bf16(vf x) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(v_bf16_bits(x), 16));
}
#endif
LORAPLEX_INLINE vi v_join(vf low, vf high) {
    constexpr __mmask32 kOdd = 0xaaaaaaaau;
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(v_bf16_bits(low), 16), kOdd, v_bf16_bits(high));
}
LORAPLEX_INLINE vi v_join_exact(vf low, vf high) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
}

LORAPLEX_INLINE vf v_load(const float* p) { return _mm512_loadu_ps(p); }
LORAPLEX_INLINE void v_store(float* p, vf x) { _mm512_storeu_ps(p, x); }
LORAPLEX_INLINE vf v_load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LORAPLEX_INLINE void v_store(bf16* p, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v_to_bf16(x));
}

LORAPLEX_INLINE vf v_keep(vf x, int64_t n, vf other) {
    const __mmask16 kept = n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
    return _mm512_mask_blend_ps(kept, other, x);
}
LORAPLEX_INLINE vf v_clear_below(vf x, vf by, float bound) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(by, v_set(bound), _CMP_NLT_UQ), x);
}
LORAPLEX_INLINE bool v_any_above(vf x, float bound) {
    return _mm512_cmp_ps_mask(x, v_set(bound), _CMP_NLE_UQ) != 0;
}
LORAPLEX_INLINE vf v_scale2(vf x, vf n) { return _mm512_scalef_ps(x, n); }

LORAPLEX_INLINE vi v_shift_left(vi x, int n) { return _mm512_slli_epi32(x, n); }
LORAPLEX_INLINE vi v_low_nibbles(vi x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
LORAPLEX_INLINE vi v_high_nibbles(vi x) { return v_low_nibbles(_mm512_srli_epi16(x, 4)); }
LORAPLEX_INLINE vf v_from_ints(vi x) { return _mm512_cvtepi32_ps(x); }
LORAPLEX_INLINE vf v_byte(vi x, int i) {
    return v_from_ints(_mm512_and_si512(_mm512_srli_epi32(x, 8 * i), _mm512_set1_epi32(255)));
}
#if LORAPLEX_SIMD_BF16
LORAPLEX_INLINE vi v_dot_bytes(vi codes, vi x, vi sums) {
    return _mm512_dpbusd_epi32(sums, codes, x);
}
#else
LORAPLEX_INLINE vi v_dot_bytes(vi codes, vi x, vi sums) {
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(255)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(sums, _mm512_add_epi32(even, odd));
}
#endif
LORAPLEX_INLINE vi v_set_bits(vi x, const uint8_t* bits, uint8_t bit) {
    __mmask64 mask;
    __builtin_memcpy(&mask, bits, sizeof mask);
    // adding is setting where the bit is clear
    return _mm512_mask_add_epi8(x, mask, x, _mm512_set1_epi8(static_cast<char>(bit)));
}
LORAPLEX_INLINE vi v_look_up(vi x, const uint8_t* table) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), x);
}
LORAPLEX_INLINE vf v_load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LORAPLEX_INLINE __m128i load_16_bytes(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
LORAPLEX_INLINE vf v_load_bytes(const uint8_t* p) {
    return v_from_ints(_mm512_cvtepu8_epi32(load_16_bytes(p)));
}
LORAPLEX_INLINE vf v_load_bytes(const int8_t* p) {
    return v_from_ints(_mm512_cvtepi8_epi32(load_16_bytes(p)));
}
LORAPLEX_INLINE void v_store_bytes(int8_t* p, vf x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

LORAPLEX_INLINE float v_first(vf x) { return _mm512_cvtss_f32(x); }
LORAPLEX_INLINE float v_sum(vf x) { return _mm512_reduce_add_ps(x); }
LORAPLEX_INLINE float v_largest(vf x) { return _mm512_reduce_max_ps(x); }
LORAPLEX_INLINE __m128 v_fold_to_4(vf x) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
LORAPLEX_INLINE float v_fold(vf x) {
    float lane[4];
    _mm_storeu_ps(lane, v_fold_to_4(x));
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}
LORAPLEX_INLINE void v_fold4(const vf* x, float* sums) {
    __m128 a = v_fold_to_4(x[0]), b = v_fold_to_4(x[1]);
    __m128 c = v_fold_to_4(x[2]), d = v_fold_to_4(x[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
}

LORAPLEX_INLINE void prefetch_l2(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

// A codebook of sixteen upper bytes, as look-ups want it.
LORAPLEX_INLINE vi v_codebook(const void* codebook) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(codebook)));
}

// 64 values of bfloat16 in the order of their columns.
struct Decoded {
    vi first, second;
};

// Decodes a row of a tile (exponent_coding.h). The low half of each byte of `index` counts.
LORAPLEX_INLINE Decoded decode_row(vi lower, vi index, vi codebook) {
    constexpr __mmask64 kOdd = 0xaaaaaaaaaaaaaaaau;
    asm("" : "+v"(lower));  // else the compiler loads it twice
#if LORAPLEX_SIMD_BF16
    const __m512i upper = _mm512_permutexvar_epi8(index, codebook);  // there four times
    return {_mm512_mask_blend_epi8(kOdd, lower, upper), _mm512_shldi_epi16(upper, lower, 8)};
#else
    const __m512i upper = _mm512_shuffle_epi8(codebook, _mm512_and_si512(index, _mm512_set1_epi8(15)));
    return {_mm512_mask_blend_epi8(kOdd, lower, upper),
            _mm512_mask_blend_epi8(kOdd, _mm512_srli_epi16(lower, 8), _mm512_slli_epi16(upper, 8))};
#endif
}

// Row 0 or 1 of a tile at `tile`.
template <int ROW>
LORAPLEX_INLINE Decoded decode_row_of(const void* tile, vi codebook) {
    const char* bytes = static_cast<const char*>(tile);
    const vi index = v_words(bytes);
    return decode_row(v_words(bytes + 64 * (ROW + 1)), ROW ? _mm512_srli_epi16(index, 4) : index,
                      codebook);
}
