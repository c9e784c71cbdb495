#include "layers/exponent_coding.h"
#include "dispatch/kernel_set.h"
#include "dispatch/openmp.h"
#include "dispatch/scratch.h"

#if LORAPLEX_X86
#include <immintrin.h>

LORAPLEX_TARGET_BEGIN(LORAPLEX_TARGET_AVX2)
namespace loraplex {
namespace {
#include "simd/avx2.h"

#include "dispatch/kernels.inc"
}  // namespace

const KernelSet kAvx2Kernels = LORAPLEX_KERNEL_SET("avx2", kAvx2, false, false);
}  // namespace loraplex
LORAPLEX_TARGET_END
#endif
