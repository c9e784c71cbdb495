// The memory roofline that benchmarks measure against: every thread reads its part, in order.

#include <cstdint>

#include "dispatch/cpu_features.h"
#include "dispatch/openmp.h"

LORAPLEX_API uint64_t loraplex_read_bytes(const void* data, int64_t n_bytes) {
    const int64_t n_words = n_bytes / 8;
    uint64_t total = 0;
#pragma omp parallel reduction(^ : total)
    {
        const int64_t thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
        const uint64_t* p = static_cast<const uint64_t*>(data);
        const int64_t end = n_words * (thread + 1) / n_threads;
        uint64_t lanes[32] = {};
        int64_t i = n_words * thread / n_threads;
        for (; i + 32 <= end; i += 32)
            for (int lane = 0; lane < 32; ++lane) lanes[lane] ^= p[i + lane];
        for (; i < end; ++i) lanes[0] ^= p[i];
        for (int lane = 0; lane < 32; ++lane) total ^= lanes[lane];
    }
    return total;
}
