// What the operator after this one reads, brought into the second cache while this one computes:
// arithmetic limits a product of some rows, memory the low-rank products that follow it.
#pragma once

#include <cstdint>

namespace loraplex {

constexpr int64_t kLineBytes = 64;

struct PrefetchRange {
    const char* first;
    int64_t n_lines;
};

// Of one thread. Running over the end of a range is harmless: prefetching never faults.
struct PrefetchList {
    const PrefetchRange* ranges;
    int64_t n_ranges;
};

}  // namespace loraplex
