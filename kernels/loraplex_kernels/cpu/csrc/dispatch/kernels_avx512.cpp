#include "layers/exponent_coding.h"
#include "dispatch/kernel_set.h"
#include "dispatch/openmp.h"
#include "dispatch/scratch.h"

#if LORAPLEX_X86
#include <immintrin.h>

LORAPLEX_TARGET_BEGIN(LORAPLEX_TARGET_AVX512)
namespace loraplex {
namespace {
#include "simd/avx512.h"

#include "dispatch/kernels.inc"
}  // namespace

const KernelSet kAvx512Kernels = LORAPLEX_KERNEL_SET("avx512", kAvx2 | kAvx512, true, false);
}  // namespace loraplex
LORAPLEX_TARGET_END
#endif
