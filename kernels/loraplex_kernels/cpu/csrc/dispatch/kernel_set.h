// The kernels of one instruction set. Python chooses among the sets by name (native.py).
#pragma once

#include "dispatch/cpu_features.h"
#include "lora/lora.h"
#include "layers/model_ops.h"

namespace loraplex {

struct KernelSet {
    const char* name;
    uint32_t features;   // bits of CpuFeature that it needs
    bool coded_pages;    // whether it reads exponent-coded factors faster than plain ones,
    bool coded_weights;  // and weights
    // Each by DType.
    void (*linear[2])(const LinearArgs&);
    void (*linear_part[2])(const LinearArgs&, int64_t n_threads, int64_t* n_taken);
    void (*linear_argmax[2])(const LinearArgs&, const uint32_t* masks, int64_t mask_stride, Largest*);
    void (*norm[2])(const NormArgs&);
    void (*gate[2])(const GateArgs&);
    void (*gate_row[2])(const GateArgs&);
    void (*rope_and_cache[2])(const RopeArgs&);
    void (*attention[2])(const AttentionArgs&);
    void (*route[2])(const RouteArgs&);
    void (*moe_combine[2])(const CombineArgs&);
    void (*shrink[2])(const ShrinkArgs&);
    void (*expand[2])(const ExpandArgs&);
    void (*sum[2])(const SumArgs&);
};

const KernelSet& kernels();  // those in use

// kernels.inc, once for each set.
extern const KernelSet kPortableKernels;
#if LORAPLEX_X86
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512Kernels;
extern const KernelSet kAvx512Bf16Kernels;
#endif

}  // namespace loraplex
