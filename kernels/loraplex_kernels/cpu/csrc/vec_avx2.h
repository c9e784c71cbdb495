// Vectors of eight floats for AVX2 + FMA. See vec_portable.h for what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace loraplex {
namespace {

using bf16 = uint16_t;
using vf = __m256;

constexpr int kWidth = 8;
constexpr int kAccumulators = 8;

struct Block {
    vf lo, hi;
};

inline vf vzero() { return _mm256_setzero_ps(); }
inline vf vset(float value) { return _mm256_set1_ps(value); }
inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

inline Block load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + kWidth)}; }

inline Block load(const bf16* p) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)))};
}

inline void store(float* p, Block block) {
    _mm256_storeu_ps(p, block.lo);
    _mm256_storeu_ps(p + kWidth, block.hi);
}

inline __m256i round_to_bf16(vf value) {  // in the upper half
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
}

inline void store(bf16* p, Block block) {
    const __m256i even = _mm256_srli_epi32(round_to_bf16(block.lo), 16);
    const __m256i odd = round_to_bf16(block.hi);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, odd, 0xaa));
}

template <typename T>
inline Block load_part(const T* p, int64_t n) {
    T buffer[2 * kWidth] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}

template <typename T>
inline void store_part(T* p, Block block, int64_t n) {
    T buffer[2 * kWidth];
    store(buffer, block);
    memcpy(p, buffer, n * sizeof(T));
}

template <typename T>
using Operand = Block;
template <typename T>
inline Block load_operand(const T* p) {
    return load(p);
}
template <typename T>
inline Block load_operand_part(const T* p, int64_t n) {
    return load_part(p, n);
}
inline vf dot(vf acc, Block a, Block b) { return vfma(a.hi, b.hi, vfma(a.lo, b.lo, acc)); }

inline __m128 fold(vf v) {
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

// (v0 + v1) + (v2 + v3) of the four lanes of each folded vector; `reduce` adds in the same order.
inline void reduce4(const vf* v, float* out) {
    __m128 a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
}

inline float reduce(vf v) {
    alignas(16) float f[4];
    _mm_store_ps(f, fold(v));
    return (f[0] + f[1]) + (f[2] + f[3]);
}

inline void prefetch(const void* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace loraplex
