#include "exponent_coding.h"
#include "kernel_set.h"
#include "openmp.h"

namespace loraplex {
namespace {
#include "simd/portable.h"

#include "kernels.inc"
}  // namespace

const KernelSet kPortableKernels = LORAPLEX_KERNEL_SET("portable", 0, false, false);
}  // namespace loraplex
