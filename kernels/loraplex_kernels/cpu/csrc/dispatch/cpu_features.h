// The features of the processor, and the macros that compile code for an instruction set.
//
// The library holds a set of kernels for each instruction set and picks one at run time
// (kernel_set.h). Code for one set is compiled between LORAPLEX_TARGET_BEGIN(…) and
// LORAPLEX_TARGET_END. Everything there has internal linkage (anonymous namespace) and uses no std
// templates: the linker keeps one copy of an inline function, which must never be one with
// instructions that another processor lacks.
#pragma once

#include <cstdint>

#define LORAPLEX_API extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define LORAPLEX_X86 1
#else
#define LORAPLEX_X86 0
#endif

#define LORAPLEX_STR(x) #x
#define LORAPLEX_PRAGMA(x) _Pragma(LORAPLEX_STR(x))
#if defined(__clang__)
#define LORAPLEX_TARGET_BEGIN(features)                                                            \
    LORAPLEX_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LORAPLEX_TARGET_END LORAPLEX_PRAGMA(clang attribute pop)
#else
#define LORAPLEX_TARGET_BEGIN(features)                                                            \
    LORAPLEX_PRAGMA(GCC push_options) LORAPLEX_PRAGMA(GCC target(features))
#define LORAPLEX_TARGET_END LORAPLEX_PRAGMA(GCC pop_options)
#endif
// For functions whose arrays of vectors must stay in registers: a call would put them into memory.
#define LORAPLEX_ALWAYS_INLINE inline __attribute__((always_inline))
#define LORAPLEX_INLINE static LORAPLEX_ALWAYS_INLINE

#define LORAPLEX_TARGET_AVX2 "avx2,fma,f16c,bmi2"
#define LORAPLEX_TARGET_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"
#define LORAPLEX_TARGET_AVX512BF16                                                                 \
    "avx512bf16,avx512vnni,avx512vbmi,avx512vbmi2,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"

namespace loraplex {

// A bit for each group of instructions that a kernel set may need.
enum CpuFeature : uint32_t {
    kAvx2 = 1u << 0,        // and FMA
    kAvx512 = 1u << 1,      // F, BW, VL, DQ
    kAvx512Bf16 = 1u << 2,  // dot products of bfloat16
    kAvx512Vbmi = 1u << 3,  // VBMI and VBMI2: look-ups and shifts of bytes
    kAvx512Vnni = 1u << 4,  // dot products of bytes
};

uint32_t cpu_features();  // of this processor and operating system

}  // namespace loraplex
