#include "model_ops.h"

#if LORAPLEX_X86
#include <immintrin.h>
#include <omp.h>

LORAPLEX_TARGET_BEGIN(LORAPLEX_TARGET_AVX2)
#define LORAPLEX_SIMD_AVX2 1
#define LORAPLEX_MODEL_OPS kModelOpsAvx2
#include "model_ops_body.inc"
LORAPLEX_TARGET_END
#endif
