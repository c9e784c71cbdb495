#include "lora.h"
#include "vec_portable.h"

#define LORAPLEX_KERNELS kLoraPortable
#include "lora_body.inc"
