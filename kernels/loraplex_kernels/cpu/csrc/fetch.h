// What the operator after this one reads, fetched to L2 while this one computes: arithmetic limits
// a product of some rows, memory the low-rank products that follow it.
#pragma once

namespace loraplex {

constexpr long kLineBytes = 64;

struct FetchRun {
    const char* first;
    long n_lines;
};

// Of one thread. Running over the end of a run is harmless: fetching never faults.
struct FetchList {
    const FetchRun* runs;
    long n_runs;
};

}  // namespace loraplex
