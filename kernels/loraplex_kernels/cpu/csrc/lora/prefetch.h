// Fetches the data of the next operator into the second cache while an operator computes: arithmetic
// limits a product of a few rows, and memory limits the low-rank products that follow it.
#pragma once

#include <cstdint>

namespace loraplex {

constexpr int64_t kLineBytes = 64;

struct PrefetchRange {
    const char* first;
    int64_t n_lines;
};

// The list of one thread. Prefetching beyond the end of a range is harmless: it never faults.
struct PrefetchList {
    const PrefetchRange* ranges;
    int64_t n_ranges;
};

}  // namespace loraplex
