#include "layers/exponent_coding.h"
#include "dispatch/kernel_set.h"
#include "dispatch/openmp.h"
#include "dispatch/scratch.h"

namespace loraplex {
namespace {
#include "simd/portable.h"

#include "dispatch/kernels.inc"
}  // namespace

const KernelSet kPortableKernels = LORAPLEX_KERNEL_SET("portable", 0, false, false);
}  // namespace loraplex
