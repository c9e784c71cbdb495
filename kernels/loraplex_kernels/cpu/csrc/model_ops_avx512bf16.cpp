#include "model_ops.h"

#if LORAPLEX_X86
#include <immintrin.h>
#include <omp.h>

LORAPLEX_TARGET_BEGIN(LORAPLEX_TARGET_AVX512BF16)
#define LORAPLEX_SIMD_AVX512 1
#define LORAPLEX_SIMD_BF16 1
#include "open_avx512.h"
#define LORAPLEX_MODEL_OPS kModelOpsAvx512Bf16
#include "model_ops_body.inc"
LORAPLEX_TARGET_END
#endif
