#include "layers/exponent_coding.h"
#include "dispatch/kernel_set.h"
#include "dispatch/openmp.h"
#include "dispatch/scratch.h"

#if LORAPLEX_X86
#include <immintrin.h>

LORAPLEX_TARGET_BEGIN(LORAPLEX_TARGET_AVX512BF16)
namespace loraplex {
namespace {
#include "simd/avx512bf16.h"

#include "dispatch/kernels.inc"
}  // namespace

const KernelSet kAvx512Bf16Kernels = LORAPLEX_KERNEL_SET(
    "avx512_bf16", kAvx2 | kAvx512 | kAvx512Bf16 | kAvx512Vbmi | kAvx512Vnni, true, true);
}  // namespace loraplex
LORAPLEX_TARGET_END
#endif
