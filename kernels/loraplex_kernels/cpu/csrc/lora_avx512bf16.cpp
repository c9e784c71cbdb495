#include "lora.h"

#if LORAPLEX_X86
#include <immintrin.h>

LORAPLEX_TARGET_BEGIN(LORAPLEX_TARGET_AVX512BF16)
#define LORAPLEX_DPBF16 1
#include "vec_avx512.h"

#define LORAPLEX_KERNELS kLoraAvx512Bf16
#include "lora_body.inc"
LORAPLEX_TARGET_END
#endif
