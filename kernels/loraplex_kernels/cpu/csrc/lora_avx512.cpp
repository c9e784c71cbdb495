#include "lora.h"

#if LORAPLEX_X86
#include <immintrin.h>

LORAPLEX_TARGET_BEGIN(LORAPLEX_TARGET_AVX512)
#define LORAPLEX_DPBF16 0
#include "vec_avx512.h"

#define LORAPLEX_KERNELS kLoraAvx512
#include "lora_body.inc"
LORAPLEX_TARGET_END
#endif
