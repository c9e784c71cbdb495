#include "lora.h"

#if LORAPLEX_X86
#include <immintrin.h>

LORAPLEX_TARGET_BEGIN(LORAPLEX_TARGET_AVX2)
#include "vec_avx2.h"

#define LORAPLEX_KERNELS kLoraAvx2
#include "lora_body.inc"
LORAPLEX_TARGET_END
#endif
