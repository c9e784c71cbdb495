// AVX-512 with dot products of bfloat16 (AVX512-BF16) and of bytes (VNNI), and operations on bytes
// (VBMI, VBMI2).
#pragma once

#define LORAPLEX_SIMD_BF16 1
#include "simd/avx512.h"
