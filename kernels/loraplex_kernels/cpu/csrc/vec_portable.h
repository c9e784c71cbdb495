// Vectors of four floats in GCC's vector extensions: SSE2 on x86-64, NEON on aarch64.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace loraplex {
namespace {

using bf16 = uint16_t;
typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

constexpr int kWidth = 4;
constexpr int kAccumulators = 8;  // tiles use so many, that few registers spill

// Two vectors of one block of 2·kWidth elements. For bf16 they hold the even and the odd ones, which
// a shift and a mask separate; every operand is split alike.
struct Block {
    vf lo, hi;
};

inline vf vzero() { return vf{0, 0, 0, 0}; }
inline vf vset(float value) { return vf{value, value, value, value}; }
inline vf vadd(vf a, vf b) { return a + b; }
inline vf vmul(vf a, vf b) { return a * b; }
inline vf vfma(vf a, vf b, vf c) {
#if defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline Block load(const float* p) {
    Block block;
    memcpy(&block, p, sizeof(block));
    return block;
}

inline Block load(const bf16* p) {
    vu both;
    memcpy(&both, p, sizeof(both));
    return {(vf)(both << 16), (vf)(both & 0xffff0000u)};
}

inline void store(float* p, Block block) { memcpy(p, &block, sizeof(block)); }

inline vu round_to_bf16(vf value) {  // in the upper half
    const vu bits = (vu)value;
    const vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const vu is_nan = (vu)(vi)(value != value);
    return (rounded & ~is_nan) | (0x7fc00000u & is_nan);
}

inline void store(bf16* p, Block block) {
    const vu both = (round_to_bf16(block.lo) >> 16) | (round_to_bf16(block.hi) & 0xffff0000u);
    memcpy(p, &both, sizeof(both));
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

inline float reduce(vf v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline void reduce4(const vf* v, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = reduce(v[i]);
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace loraplex
