// Vectors of eight floats for AVX2 with FMA. See portable.h for what each name means.
#pragma once

#include "simd/scalar.h"

constexpr int kLanes = 8;
constexpr int kAccumulators = 8;
typedef __m256 vf;
typedef __m256i vi;

LORAPLEX_INLINE vf v_set(float x) { return _mm256_set1_ps(x); }
LORAPLEX_INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
LORAPLEX_INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
LORAPLEX_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
LORAPLEX_INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
LORAPLEX_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
LORAPLEX_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
LORAPLEX_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
LORAPLEX_INLINE vf v_round(vf x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

LORAPLEX_INLINE vi v_words(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
LORAPLEX_INLINE void v_store_words(void* p, vi x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), x);
}
LORAPLEX_INLINE vi v_word(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
LORAPLEX_INLINE vf v_as_floats(vi x) { return _mm256_castsi256_ps(x); }
LORAPLEX_INLINE vf v_low(vi x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
LORAPLEX_INLINE vf v_high(vi x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-0x10000)));
}
LORAPLEX_INLINE vf v_dot(vi a, vi b, vf c) {
    return v_fma(v_high(a), v_high(b), v_fma(v_low(a), v_low(b), c));
}
LORAPLEX_INLINE vi v_bf16_bits(vf x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, is_nan);
}
LORAPLEX_INLINE vi v_join(vf low, vf high) {
    return _mm256_blend_epi16(_mm256_srli_epi32(v_bf16_bits(low), 16), v_bf16_bits(high), 0xaa);
}
LORAPLEX_INLINE vi v_join_exact(vf low, vf high) {
    return _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(low), 16), _mm256_castps_si256(high));
}

LORAPLEX_INLINE vf v_load(const float* p) { return _mm256_loadu_ps(p); }
LORAPLEX_INLINE void v_store(float* p, vf x) { _mm256_storeu_ps(p, x); }
LORAPLEX_INLINE vf v_load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
LORAPLEX_INLINE void v_store(bf16* p, vf x) {
    const __m256i top = _mm256_srli_epi32(v_bf16_bits(x), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

LORAPLEX_INLINE vf v_keep(vf x, int64_t n, vf other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int count = n > 8 ? 8 : n < 0 ? 0 : static_cast<int>(n);
    const __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(kept));
}
LORAPLEX_INLINE vf v_clear_below(vf x, vf by, float bound) {
    return _mm256_and_ps(_mm256_cmp_ps(by, v_set(bound), _CMP_NLT_UQ), x);
}
LORAPLEX_INLINE bool v_any_above(vf x, float bound) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x, v_set(bound), _CMP_NLE_UQ)) != 0;
}
LORAPLEX_INLINE vf v_power2(__m256i n) {
    const __m256i biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
LORAPLEX_INLINE vf v_scale2(vf x, vf n) {  // in two steps, since 2^128 is no float
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return v_mul(v_mul(x, v_power2(half)), v_power2(_mm256_sub_epi32(whole, half)));
}

LORAPLEX_INLINE vi v_shift_left(vi x, int n) { return _mm256_slli_epi32(x, n); }
LORAPLEX_INLINE vi v_low_nibbles(vi x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
LORAPLEX_INLINE vi v_high_nibbles(vi x) { return v_low_nibbles(_mm256_srli_epi16(x, 4)); }
LORAPLEX_INLINE vf v_from_ints(vi x) { return _mm256_cvtepi32_ps(x); }
LORAPLEX_INLINE vf v_byte(vi x, int i) {
    return v_from_ints(_mm256_and_si256(_mm256_srli_epi32(x, 8 * i), _mm256_set1_epi32(255)));
}
LORAPLEX_INLINE vi v_dot_bytes(vi codes, vi x, vi sums) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}
LORAPLEX_INLINE vi v_set_bits(vi x, const uint8_t* bits, uint8_t bit) {
    int mask;
    __builtin_memcpy(&mask, bits, sizeof mask);
    const __m256i of_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                               0x0303030303030303);
    const __m256i own = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(mask), of_byte);
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own);
    return _mm256_or_si256(
        x, _mm256_and_si256(is_set, _mm256_set1_epi8(static_cast<char>(bit))));
}
LORAPLEX_INLINE vi v_look_up(vi x, const uint8_t* table) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), x);
}
LORAPLEX_INLINE vf v_load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LORAPLEX_INLINE __m128i load_8_bytes(const void* p) {
    return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}
LORAPLEX_INLINE vf v_load_bytes(const uint8_t* p) {
    return v_from_ints(_mm256_cvtepu8_epi32(load_8_bytes(p)));
}
LORAPLEX_INLINE vf v_load_bytes(const int8_t* p) {
    return v_from_ints(_mm256_cvtepi8_epi32(load_8_bytes(p)));
}
LORAPLEX_INLINE void v_store_bytes(int8_t* p, vf x) {
    const __m256i words = _mm256_cvtps_epi32(x);
    const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(words, words), 0x08);
    const __m128i half = _mm256_castsi256_si128(shorts);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}

LORAPLEX_INLINE float v_first(vf x) { return _mm256_cvtss_f32(x); }
LORAPLEX_INLINE __m128 v_fold_to_4(vf x) {
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
LORAPLEX_INLINE float v_sum(vf x) {
    float lane[4];
    _mm_storeu_ps(lane, v_fold_to_4(x));
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}
LORAPLEX_INLINE float v_largest(vf x) {
    float lane[4];
    _mm_storeu_ps(lane, _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
    const float a = lane[0] > lane[2] ? lane[0] : lane[2], b = lane[1] > lane[3] ? lane[1] : lane[3];
    return a > b ? a : b;
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
