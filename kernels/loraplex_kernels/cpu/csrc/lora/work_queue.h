// Work items for the threads of a team. Each thread begins with a range of its own; one that is
// done takes from the others, so that a thread that the system holds up delays nobody by more than an
// item.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

namespace loraplex {

class WorkQueue {
public:
    // Room for a team; forgets all assignments. Not while a team works.
    void reset(int n_threads) {
        n_threads_ = n_threads;
        if (ranges_.size() < static_cast<size_t>(n_threads)) ranges_ = std::vector<Range>(n_threads);
    }
    // The items [first, end) go to `thread` first.
    void deal(int thread, size_t first, size_t end) {
        ranges_[thread].next = first;
        ranges_[thread].end = end;
    }
    void deal_evenly(size_t n_items) {
        for (int i = 0; i < n_threads_; ++i)
            deal(i, n_items * i / n_threads_, n_items * (i + 1) / n_threads_);
    }
    size_t first(int thread) const { return ranges_[thread].next; }
    size_t end(int thread) const { return ranges_[thread].end; }

    // Runs items until none is left. Every thread of the team calls it.
    template <typename Run>
    void work(int thread, const Run& run) {
        for (int i = 0; i < n_threads_; ++i) {
            Range& range = ranges_[(thread + i) % n_threads_];
            for (;;) {
                if (range.next.load(std::memory_order_relaxed) >= range.end) break;
                const size_t item = range.next.fetch_add(1, std::memory_order_relaxed);
                if (item >= range.end) break;
                run(item);
            }
        }
    }

private:
    struct alignas(64) Range {
        std::atomic<size_t> next{0};
        size_t end = 0;
    };
    std::vector<Range> ranges_;
    int n_threads_ = 1;
};

}  // namespace loraplex
