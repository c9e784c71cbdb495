#include "isa.h"

#include <atomic>

namespace loraplex {
namespace {

Isa detect() {
#if LORAPLEX_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2"))
        return kAvx512Bf16;
    if (avx512) return kAvx512;
    if (avx2) return kAvx2;
#endif
    return kPortable;
}

const Isa g_best = detect();
std::atomic<int> g_current{g_best};

}  // namespace

Isa current_isa() { return static_cast<Isa>(g_current.load(std::memory_order_relaxed)); }

}  // namespace loraplex

// Version of the C interface: native.py refuses a library built from other sources.
LORAPLEX_API int loraplex_abi() { return 9; }

LORAPLEX_API int loraplex_isa() { return loraplex::current_isa(); }

// Limits the instruction set (tests run every path on one machine); returns what is now in use.
LORAPLEX_API int loraplex_limit_isa(int isa) {
    loraplex::g_current = isa < loraplex::g_best ? (isa < 0 ? 0 : isa) : loraplex::g_best;
    return loraplex::current_isa();
}
