// The plan of a LoRA call over threads. The planner reads tables and indices, but no factor and no x.
#pragma once

#include <vector>

#include "layers/exponent_coding.h"
#include "lora/lora.h"
#include "lora/prefetch.h"
#include "lora/work_queue.h"

namespace loraplex {

struct LoraCall {
    const LoraTarget& target;
    const void* x;
    int64_t x_stride;
    char* out;
    int64_t out_stride;
    const int32_t* slots;
    const int32_t* indptr;
    const int32_t* indices;  // rows of out
    const float* weights;
    int64_t n_segments, n_indices;
    const int32_t* x_rows;  // rows of x; the same as `indices`, but for pairs that share a row of x

    LoraCall(const LoraTarget& target, const void* x, int64_t x_stride, void* out, int64_t out_stride,
             const LoraSegments& s)
        : target(target), x(x), x_stride(x_stride), out(static_cast<char*>(out)),
          out_stride(out_stride), slots(s.slots), indptr(s.indptr), indices(s.indices),
          weights(s.weights), n_segments(s.n_segments), n_indices(s.n_indices), x_rows(s.indices) {}

    int64_t bytes() const { return element_bytes(target.dtype); }  // of an element
    int64_t n_rows(int64_t segment) const { return indptr[segment + 1] - indptr[segment]; }
    int64_t n_columns() const {
        int64_t n = 0;
        for (int64_t i = 0; i < target.n_slices; ++i) n += target.out_features[i];
        return n;
    }
    // Returns the index of a slice of a segment's slot in tables [n_slots, n_slices].
    int64_t table_index(int64_t segment, int64_t slice) const {
        return slots[segment] * target.n_slices + slice;
    }
    bool has_work(int64_t segment, int64_t slice) const {
        const int64_t at = table_index(segment, slice);
        return target.ranks[at] > 0 || target.scale[at] != kNoPage || target.bias[at] != kNoPage;
    }
};

// 0, or the number of the check that failed (`SEGMENT_ERRORS` in cpu/lora.py): x and out have `n_rows`.
int check_segments(const LoraCall& call, int64_t n_rows);

// The work of one segment on one slice. Its low-rank intermediate [rows of the segment, h_stride] stands
// at `h` among those of the call.
struct SegmentSlice {
    int64_t segment, slice, rank, h;
    int64_t h_stride() const { return (rank + 15) / 16 * 16; }  // whole cache lines
};

// Some rows of one segment on all its slices [first_slice, last_slice) of the plan: both products, by one
// thread, which reads the factors in the order in which they lie, A then Bᵀ of every slice.
struct SegmentTask {
    int32_t first_slice, last_slice;
    int64_t first_row, n_rows;
    int64_t cost;
};

// Smaller work items, where there are too few segments or too unequal ones.
struct ShrinkItem {
    int32_t slice, page;
    int64_t first_row, n_rows;
    int32_t first_rank, n_ranks;  // within the page
};

// Some columns of one slice of one segment or, where rows stand in several segments, the same columns of
// all of them in order, with all their rows (n_rows = 0).
struct ExpandItem {
    int32_t first_slice, last_slice;
    int64_t first_row, n_rows;
    int64_t first_column, n_columns;
};

enum class Partition { kNothing, kSegmentTasks, kWorkItems };

// The plan of one calling thread. It is reused and grows to the largest call.
struct LoraPlan {
    Partition partition = Partition::kNothing;
    int n_threads = 1;
    std::vector<SegmentSlice> slices;
    std::vector<SegmentTask> tasks;  // by thread
    std::vector<ShrinkItem> shrink_items;
    std::vector<ExpandItem> expand_items;
    WorkQueue shrink_queue, expand_queue;  // of tasks, or of shrink and expand items
    std::vector<int64_t> first_columns;    // [n_slices], of each slice in out
    std::vector<int32_t> x_rows;           // moe.cpp
    std::vector<char> pairs;               // rows of out, one for each pair

    float* h() { return reinterpret_cast<float*>(h_lines.data()); }

    // The planner's scratch memory.
    struct alignas(64) Line {  // no two threads write to one cache line
        float values[16];
    };
    std::vector<Line> h_lines;
    std::vector<SegmentTask> by_cost;
    std::vector<PrefetchRange> prefetch_ranges;
    std::vector<PrefetchList> prefetch_lists;
    std::vector<int64_t> row_seen;  // the number of the call that saw the row last
    int64_t n_calls = 0;
};

LoraPlan& own_plan();  // of this thread

// Plans a call whose rows of out are `n_rows`.
void plan_lora(const LoraCall& call, LoraPlan& plan, int64_t n_rows);

// Returns the memory that each thread reads for its first tasks, in order: [omp_get_max_threads()].
// Returns null if work items of one factor go to all threads.
const PrefetchList* list_prefetches(const LoraCall& call, LoraPlan& plan);

// Some rank rows of a page of A or Bᵀ; of coded ones `first_rank` begins a block.
struct RankRows {
    const char* first;
    bool coded;
    int64_t row_bytes;
};
RankRows rank_rows(const LoraCall& call, const SegmentSlice& slice, const int64_t* pages, int64_t page,
                   int64_t first_rank, int64_t width);

}  // namespace loraplex
