// The kernel sets of this library, one for each instruction set, and the set in use.
#include "dispatch/kernel_set.h"

#include <atomic>

namespace loraplex {

uint32_t cpu_features() {
    uint32_t found = 0;
#if LORAPLEX_X86
    __builtin_cpu_init();
    const auto add = [&found](bool has, CpuFeature feature) { if (has) found |= feature; };
    add(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), kAvx2);
    add(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
        kAvx512);
    add(__builtin_cpu_supports("avx512bf16"), kAvx512Bf16);
    add(__builtin_cpu_supports("avx512vnni"), kAvx512Vnni);
    add(__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2"), kAvx512Vbmi);
#endif
    return found;
}

namespace {

const KernelSet* const kSets[] = {  // the best first
#if LORAPLEX_X86
    &kAvx512Bf16Kernels, &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kPortableKernels};
constexpr int kCount = sizeof kSets / sizeof kSets[0];

bool runs_here(const KernelSet& set) {
    static const uint32_t features = cpu_features();
    return (set.features & ~features) == 0;
}

const KernelSet* best() {
    for (const KernelSet* set : kSets)
        if (runs_here(*set)) return set;
    return &kPortableKernels;
}

std::atomic<const KernelSet*> g_in_use{best()};

}  // namespace

const KernelSet& kernels() { return *g_in_use.load(std::memory_order_relaxed); }

}  // namespace loraplex

// The name of set `index`, the best first; null beyond the last.
LORAPLEX_API const char* loraplex_kernel_set_name(int index) {
    return index >= 0 && index < loraplex::kCount ? loraplex::kSets[index]->name : nullptr;
}

LORAPLEX_API int loraplex_kernel_set_runs_here(int index) {
    return loraplex_kernel_set_name(index) && loraplex::runs_here(*loraplex::kSets[index]);
}

// From now on these kernels run, in this process. Tests run every set on one machine.
LORAPLEX_API void loraplex_use_kernel_set(int index) {
    if (loraplex_kernel_set_runs_here(index)) loraplex::g_in_use = loraplex::kSets[index];
}

LORAPLEX_API const char* loraplex_kernel_set() { return loraplex::kernels().name; }
LORAPLEX_API int loraplex_prefers_coded_pages() { return loraplex::kernels().coded_pages; }
LORAPLEX_API int loraplex_prefers_coded_weights() { return loraplex::kernels().coded_weights; }
