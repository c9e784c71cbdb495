// Functions over the vectors of any instruction set: pairs of vectors, element types, exponentials.
#pragma once

// 2 · kLanes neighbouring elements: of float32 the first and the second half; of bfloat16 the even and
// the odd ones, which a shift and a mask separate.
struct Vec2 {
    vf lo, hi;
};
constexpr int64_t kPair = 2 * kLanes;  // elements

LORAPLEX_INLINE Vec2 split(vi words) { return {v_low(words), v_high(words)}; }
LORAPLEX_INLINE Vec2 load2(const float* p) { return {v_load(p), v_load(p + kLanes)}; }
LORAPLEX_INLINE Vec2 load2(const bf16* p) { return split(v_words(p)); }
LORAPLEX_INLINE void store2(float* p, Vec2 x) { v_store(p, x.lo), v_store(p + kLanes, x.hi); }
LORAPLEX_INLINE void store2(bf16* p, Vec2 x) { v_store_words(p, v_join(x.lo, x.hi)); }
LORAPLEX_INLINE Vec2 fma2(vf a, Vec2 b, Vec2 c) { return {v_fma(a, b.lo, c.lo), v_fma(a, b.hi, c.hi)}; }

// The first n < kPair elements at p, zeros behind them.
template <typename T>
struct Tail {
    T values[kPair] = {};
    Tail(const T* p, int64_t n) { __builtin_memcpy(values, p, n * sizeof(T)); }
};
template <typename T>
inline Vec2 load2_part(const T* p, int64_t n) {
    return load2(Tail<T>(p, n).values);
}
template <typename T>
inline void store2_part(T* p, Vec2 x, int64_t n) {
    T values[kPair];
    store2(values, x);
    __builtin_memcpy(p, values, n * sizeof(T));
}

// Element types. A 32-bit word is a VNNI pair of bfloat16, or one float: packed weights and the KV
// cache are arrays of words. `dot` multiplies words by one word of x, in all lanes; `dot2` sums the
// products of kPair elements in lanes.
struct Bf16 {
    typedef bf16 T;
    static constexpr int unit = 2;  // elements of a word
    typedef vi Operand;
    LORAPLEX_INLINE vf dot(vi words, uint32_t word, vf acc) { return v_dot(words, v_word(word), acc); }
    // Writes kLanes words, each of a code from `first` and one from `second`.
    LORAPLEX_INLINE void store_codes(uint32_t* words, const int8_t* first, const int8_t* second) {
        v_store_words(words, v_join_exact(v_load_bytes(first), v_load_bytes(second)));
    }
    LORAPLEX_INLINE Operand operand(const T* p) { return v_words(p); }
    LORAPLEX_INLINE vf dot2(Operand a, Operand b, vf acc) { return v_dot(a, b, acc); }
};
struct F32 {
    typedef float T;
    static constexpr int unit = 1;
    typedef Vec2 Operand;
    LORAPLEX_INLINE vf dot(vi words, uint32_t word, vf acc) {
        return v_fma(v_as_floats(words), v_set(from_bits(word)), acc);
    }
    LORAPLEX_INLINE void store_codes(uint32_t* words, const int8_t* first, const int8_t*) {
        v_store(reinterpret_cast<float*>(words), v_load_bytes(first));
    }
    LORAPLEX_INLINE Operand operand(const T* p) { return load2(p); }
    LORAPLEX_INLINE vf dot2(Operand a, Operand b, vf acc) {
        return v_fma(a.hi, b.hi, v_fma(a.lo, b.lo, acc));
    }
};

// Rounds to the element type and back: where PyTorch would have stored an intermediate.
LORAPLEX_INLINE vf v_rounded(vf x, const float*) { return x; }
LORAPLEX_INLINE vf v_rounded(vf x, const bf16*) { return v_high(v_bf16_bits(x)); }

// e^x to about 1 ulp; exactly 0 below -87, -inf included. NaN stays NaN (constants come first in
// max and min, which return their second operand then).
LORAPLEX_INLINE vf v_exp(vf given) {
    const vf x = v_min(v_set(89.0f), v_max(v_set(-88.0f), given));
    const vf n = v_round(v_mul(x, v_set(1.44269504088896341f)));
    vf f = v_fma(n, v_set(-0.693359375f), x);
    f = v_fma(n, v_set(2.12194440e-4f), f);
    vf p = v_set(1.9875691500e-4f);
    p = v_fma(p, f, v_set(1.3981999507e-3f));
    p = v_fma(p, f, v_set(8.3334519073e-3f));
    p = v_fma(p, f, v_set(4.1665795894e-2f));
    p = v_fma(p, f, v_set(1.6666665459e-1f));
    p = v_fma(p, f, v_set(5.0000001201e-1f));
    p = v_fma(p, v_mul(f, f), v_add(f, v_set(1.0f)));
    return v_clear_below(v_scale2(p, n), given, -87.0f);
}
LORAPLEX_INLINE vf v_sigmoid(vf x) {
    return v_div(v_set(1.0f), v_add(v_set(1.0f), v_exp(v_sub(v_set(0.0f), x))));
}
LORAPLEX_INLINE vf v_tanh(vf x) {
    return v_sub(v_mul(v_set(2.0f), v_sigmoid(v_add(x, x))), v_set(1.0f));
}
