// Instruction sets of the native kernels: one library, chosen at run time.
//
// Code for one set lives in its own file between LORAPLEX_TARGET_BEGIN_* and LORAPLEX_TARGET_END.
// Everything in such a file has internal linkage (anonymous namespace) and uses no std templates:
// an inline function that is emitted there with wide instructions must never be the copy that the
// linker keeps for another file.
#pragma once

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
// Where an array of vectors must stay in registers, which a call ends.
#define LORAPLEX_ALWAYS_INLINE inline __attribute__((always_inline))

#define LORAPLEX_TARGET_AVX2 "avx2,fma,f16c,bmi2"
#define LORAPLEX_TARGET_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"
#define LORAPLEX_TARGET_AVX512BF16                                                                 \
    "avx512bf16,avx512vbmi,avx512vbmi2,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"

namespace loraplex {

enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best set of this processor and system, or a lower one if the caller limited it.
Isa current_isa();

}  // namespace loraplex
