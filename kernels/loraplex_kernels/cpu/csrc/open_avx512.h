// Opens compact values with AVX-512, for the kernels of adapters and of the base; included once per set.
#pragma once

#include <immintrin.h>

namespace loraplex {
namespace {

#if LORAPLEX_DPBF16 || LORAPLEX_SIMD_BF16
#define LORAPLEX_VBMI 1  // isa.h: whatever has products of bf16 here has these, too
#endif

inline __m512i table_of(const void* table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(table)));
}

// What stands in the table at the low four bits of each byte.
inline __m512i look_up(__m512i table, __m512i places) {
#if LORAPLEX_VBMI
    return _mm512_permutexvar_epi8(places, table);  // there it is four times: the bits above count nothing
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(places, _mm512_set1_epi8(15)));
#endif
}

struct RawPair {
    __m512i first, second;  // 32 values of bf16 each
};

// One row of a group (compact.h); the low half bytes of `places` count.
inline RawPair open_row(__m512i low, __m512i places, __m512i table) {
    constexpr __mmask64 kOdd = 0xaaaaaaaaaaaaaaaau;
    asm("" : "+v"(low));  // else it is loaded twice
    const __m512i high = look_up(table, places);
#if LORAPLEX_VBMI
    return {_mm512_mask_blend_epi8(kOdd, low, high), _mm512_shldi_epi16(high, low, 8)};
#else
    return {_mm512_mask_blend_epi8(kOdd, low, high),
            _mm512_mask_blend_epi8(kOdd, _mm512_srli_epi16(low, 8), _mm512_slli_epi16(high, 8))};
#endif
}

}  // namespace
}  // namespace loraplex
