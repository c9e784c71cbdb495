// Cuts one LoRA call into segment tasks or work items, and lists what to prefetch. See lora_plan.h.
#include "lora/lora_plan.h"

#include <algorithm>

#include "dispatch/openmp.h"

namespace loraplex {
namespace {

constexpr int64_t kRowBlock = 64;          // rows of one item: their x and h stay in L2
constexpr int64_t kColumnStep = 64;        // columns are cut at multiples: no cache line has two owners
constexpr int64_t kItemBytes = 64 << 10;   // of factors, at most
constexpr int64_t kItemsPerThread = 6;     // so many that one slow thread delays nobody long
constexpr int64_t kTasksPerThread = 2;     // at least so many of the largest task's cost
constexpr int64_t kSerialWork = 64 << 10;  // multiply-adds below which threads cost more than they bring

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void prefetch_table(const void* first, int64_t n_bytes) {
    const char* p = static_cast<const char*>(first);
    for (int64_t i = 0; i < n_bytes; i += kLineBytes) __builtin_prefetch(p + i);
    __builtin_prefetch(p + n_bytes - 1);
}

// The tables are cold at every call, and their reads would wait one for another.
void prefetch_tables(const LoraCall& call) {
    const LoraTarget& t = call.target;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        if (call.slots[s] < 0) continue;
        const int64_t at = call.table_index(s, 0);
        prefetch_table(t.ranks + at, t.n_slices * 4);
        prefetch_table(t.scale + at, t.n_slices * 8);
        prefetch_table(t.bias + at, t.n_slices * 8);
        prefetch_table(t.a_pages + at * t.max_pages, t.n_slices * t.max_pages * 8);
        prefetch_table(t.b_pages + at * t.max_pages, t.n_slices * t.max_pages * 8);
    }
}

// Slices by segment. Returns the multiply-adds of the call.
int64_t list_slices(const LoraCall& call, LoraPlan& plan) {
    const LoraTarget& t = call.target;
    plan.slices.clear();
    int64_t n_products = 0, h = 0;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        const int64_t n_rows = call.n_rows(s);
        if (call.slots[s] < 0 || n_rows == 0) continue;
        for (int64_t i = 0; i < t.n_slices; ++i) {
            if (!call.has_work(s, i)) continue;
            const int64_t rank = t.ranks[call.table_index(s, i)];
            plan.slices.push_back({s, i, rank, h});
            h += n_rows * plan.slices.back().h_stride();
            n_products += n_rows * (rank * (t.in_features + t.out_features[i]) + t.out_features[i]);
        }
    }
    if (plan.h_lines.size() * 16 < static_cast<size_t>(h)) plan.h_lines.resize(h / 16);
    return n_products;
}

// Returns true if no row is in two segments, so that segments may run in parallel.
bool rows_are_disjoint(const LoraCall& call, LoraPlan& plan, int64_t n_rows) {
    if (plan.row_seen.size() < static_cast<size_t>(n_rows)) plan.row_seen.resize(n_rows, 0);
    ++plan.n_calls;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        if (call.slots[s] < 0) continue;
        for (int32_t p = call.indptr[s]; p < call.indptr[s + 1]; ++p) {
            int64_t& seen = plan.row_seen[call.indices[p]];
            if (seen == plan.n_calls) return false;
            seen = plan.n_calls;
        }
    }
    return true;
}

// Tasks are assigned to the threads in turn, the costly ones first. False if there are too few or too unequal
// ones.
bool cut_into_tasks(const LoraCall& call, LoraPlan& plan) {
    const LoraTarget& t = call.target;
    const int n_threads = plan.n_threads;
    std::vector<SegmentTask>& tasks = plan.by_cost;
    tasks.clear();
    int64_t total = 0;
    for (size_t p = 0; p < plan.slices.size();) {  // one task a segment
        size_t end = p;
        int64_t cost = 0;  // of kRowsTogether rows
        for (; end < plan.slices.size() && plan.slices[end].segment == plan.slices[p].segment; ++end)
            cost += (plan.slices[end].rank + 1) *
                    (t.in_features + t.out_features[plan.slices[end].slice]);
        const int64_t n_rows = call.n_rows(plan.slices[p].segment);
        tasks.push_back({static_cast<int32_t>(p), static_cast<int32_t>(end), 0, n_rows, cost});
        total += cost * divide_up(n_rows, kRowsTogether);
        p = end;
    }
    int64_t largest = 0;
    for (size_t i = 0, n_segments = tasks.size(); i < n_segments; ++i) {  // those with many rows are cut
        const SegmentTask segment = tasks[i];
        const int64_t fair = total / (segment.cost * kTasksPerThread * n_threads);
        const int64_t n_rows =
            std::max<int64_t>(1, std::min(fair, kRowBlock / kRowsTogether)) * kRowsTogether;
        for (int64_t row = 0; row < segment.n_rows; row += n_rows) {
            SegmentTask task = segment;
            task.first_row = row;
            task.n_rows = std::min(n_rows, segment.n_rows - row);
            task.cost = segment.cost * divide_up(task.n_rows, kRowsTogether);
            largest = std::max(largest, task.cost);
            if (row == 0)
                tasks[i] = task;
            else
                tasks.push_back(task);
        }
    }
    if (largest * n_threads * kTasksPerThread > total) return false;
    const auto costs_more = [](const SegmentTask& a, const SegmentTask& b) { return a.cost > b.cost; };
    if (!std::is_sorted(tasks.begin(), tasks.end(), costs_more))
        std::stable_sort(tasks.begin(), tasks.end(), costs_more);
    plan.tasks.clear();
    for (int thread = 0; thread < n_threads; ++thread) {
        const size_t first = plan.tasks.size();
        for (size_t i = thread; i < tasks.size(); i += n_threads) plan.tasks.push_back(tasks[i]);
        plan.shrink_queue.deal(thread, first, plan.tasks.size());
        plan.expand_queue.deal(thread, first, plan.tasks.size());
    }
    return true;
}

void cut_shrink(const LoraCall& call, LoraPlan& plan) {
    plan.shrink_items.clear();
    int64_t n_pages = 0;
    for (const SegmentSlice& slice : plan.slices)
        n_pages += divide_up(slice.rank, kPageRank) * divide_up(call.n_rows(slice.segment), kRowBlock);
    const bool few = n_pages < kItemsPerThread * plan.n_threads && plan.n_threads > 1;
    const int64_t step = few ? kBlockRows : kPageRank;
    for (size_t p = 0; p < plan.slices.size(); ++p) {
        const SegmentSlice& slice = plan.slices[p];
        const int64_t n_rows = call.n_rows(slice.segment);
        for (int64_t row = 0; row < n_rows; row += kRowBlock)
            for (int64_t first = 0; first < slice.rank; first += step)
                plan.shrink_items.push_back(
                    {static_cast<int32_t>(p), static_cast<int32_t>(first / kPageRank), row,
                     std::min(kRowBlock, n_rows - row), static_cast<int32_t>(first % kPageRank),
                     static_cast<int32_t>(std::min(step, slice.rank - first))});
    }
}

// Columns of one item: few enough for its bytes and for `wanted` items of the slice.
int64_t column_step(int64_t width, int64_t rank, int64_t wanted, int64_t bytes) {
    const int64_t fit = kItemBytes / (std::max<int64_t>(rank, 1) * bytes);
    const int64_t even = std::min(divide_up(width, wanted), kExpandColumns);
    return std::max(kColumnStep, divide_up(std::min(fit, even), kColumnStep) * kColumnStep);
}

void cut_expand_by_segment(const LoraCall& call, LoraPlan& plan) {
    int64_t n_blocks = 0;
    for (const SegmentSlice& slice : plan.slices)
        n_blocks += divide_up(call.n_rows(slice.segment), kRowBlock);
    const int64_t wanted =
        plan.n_threads > 1 ? divide_up(kItemsPerThread * plan.n_threads, n_blocks) : 1;
    for (size_t p = 0; p < plan.slices.size(); ++p) {
        const SegmentSlice& slice = plan.slices[p];
        const int64_t n_rows = call.n_rows(slice.segment);
        const int64_t width = call.target.out_features[slice.slice];
        const int64_t step = column_step(width, slice.rank, wanted, call.bytes());
        for (int64_t row = 0; row < n_rows; row += kRowBlock)
            for (int64_t column = 0; column < width; column += step)
                plan.expand_items.push_back({static_cast<int32_t>(p), static_cast<int32_t>(p + 1), row,
                                             std::min(kRowBlock, n_rows - row), column,
                                             std::min(step, width - column)});
    }
}

// For rows in several segments: no two items write to the same columns of out.
void cut_expand_by_column(const LoraCall& call, LoraPlan& plan) {
    std::stable_sort(plan.slices.begin(), plan.slices.end(),
                     [](const SegmentSlice& a, const SegmentSlice& b) { return a.slice < b.slice; });
    for (size_t p = 0; p < plan.slices.size();) {
        size_t end = p;
        while (end < plan.slices.size() && plan.slices[end].slice == plan.slices[p].slice) ++end;
        const int64_t width = call.target.out_features[plan.slices[p].slice];
        const int64_t wanted = plan.n_threads > 1 ? kItemsPerThread * plan.n_threads : 1;
        const int64_t step = column_step(width, 1, wanted, call.bytes());
        for (int64_t column = 0; column < width; column += step)
            plan.expand_items.push_back({static_cast<int32_t>(p), static_cast<int32_t>(end), 0, 0,
                                         column, std::min(step, width - column)});
        p = end;
    }
}

// Rows of one page; one range with the page before it where they touch, as the pages of a slot do.
void add_range(std::vector<PrefetchRange>& ranges, size_t first_own, const char* page, int64_t n_bytes) {
    const int64_t n_lines = divide_up(n_bytes, kLineBytes);
    if (ranges.size() > first_own) {
        PrefetchRange& last = ranges.back();
        if (last.first + last.n_lines * kLineBytes == page) {
            last.n_lines += n_lines;
            return;
        }
    }
    ranges.push_back({page, n_lines});
}

}  // namespace

LoraPlan& own_plan() {
    thread_local LoraPlan plan;
    return plan;
}

int check_segments(const LoraCall& call, int64_t n_rows) {
    if (call.indptr[0] < 0) return 6;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        if (call.slots[s] >= call.target.n_slots) return 1;
        if (call.indptr[s + 1] < call.indptr[s] || call.indptr[s + 1] > call.n_indices) return 6;
        if (call.slots[s] < 0) continue;
        int32_t last = -1;
        for (int32_t p = call.indptr[s]; p < call.indptr[s + 1]; ++p) {
            if (call.indices[p] < 0 || call.indices[p] >= n_rows) return 2;
            if (call.indices[p] <= last) return 3;
            last = call.indices[p];
        }
    }
    return 0;
}

void plan_lora(const LoraCall& call, LoraPlan& plan, int64_t n_rows) {
    const LoraTarget& t = call.target;
    plan.partition = Partition::kNothing;
    prefetch_tables(call);
    const int64_t n_products = list_slices(call, plan);
    if (plan.slices.empty()) return;
    plan.first_columns.assign(t.n_slices, 0);
    for (int64_t i = 1; i < t.n_slices; ++i)
        plan.first_columns[i] = plan.first_columns[i - 1] + t.out_features[i - 1];
    plan.n_threads = n_products < kSerialWork ? 1 : omp_get_max_threads();
    plan.shrink_queue.reset(plan.n_threads);
    plan.expand_queue.reset(plan.n_threads);
    plan.expand_items.clear();
    if (!rows_are_disjoint(call, plan, n_rows)) {
        cut_expand_by_column(call, plan);
    } else if (cut_into_tasks(call, plan)) {
        plan.partition = Partition::kSegmentTasks;
        return;
    } else {
        cut_expand_by_segment(call, plan);
    }
    cut_shrink(call, plan);
    plan.partition = Partition::kWorkItems;
    plan.shrink_queue.deal_evenly(plan.shrink_items.size());
    plan.expand_queue.deal_evenly(plan.expand_items.size());
}

RankRows rank_rows(const LoraCall& call, const SegmentSlice& slice, const int64_t* pages, int64_t page,
                   int64_t first_rank, int64_t width) {
    const int64_t at = call.table_index(slice.segment, slice.slice);
    const int64_t offset = pages[at * call.target.max_pages + page];
    const bool coded = offset & kCoded;
    const int64_t row_bytes = coded ? coded_row_bytes(width) : width * call.bytes();
    return {static_cast<const char*>(call.target.storage) + (offset & ~kCoded) * call.bytes() +
                first_rank * row_bytes,
            coded, row_bytes};
}

const PrefetchList* list_prefetches(const LoraCall& call, LoraPlan& plan) {
    if (plan.partition != Partition::kSegmentTasks) return nullptr;
    const LoraTarget& t = call.target;
    std::vector<PrefetchRange>& ranges = plan.prefetch_ranges;
    ranges.clear();
    plan.prefetch_lists.assign(std::max(plan.n_threads, omp_get_max_threads()), {nullptr, 0});
    for (int thread = 0; thread < plan.n_threads; ++thread) {
        const size_t first_own = ranges.size();
        for (size_t i = plan.shrink_queue.first(thread); i < plan.shrink_queue.end(thread); ++i) {
            const SegmentTask& task = plan.tasks[i];
            if (task.first_row > 0) continue;  // its segment's first task prefetches for all
            for (const int64_t* pages : {t.a_pages, t.b_pages})
                for (int32_t p = task.first_slice; p < task.last_slice; ++p) {
                    const SegmentSlice& slice = plan.slices[p];
                    const int64_t width =
                        pages == t.a_pages ? t.in_features : t.out_features[slice.slice];
                    for (int64_t first = 0; first < slice.rank; first += kPageRank) {
                        const RankRows rows =
                            rank_rows(call, slice, pages, first / kPageRank, 0, width);
                        add_range(ranges, first_own, rows.first,
                                  std::min<int64_t>(kPageRank, slice.rank - first) * rows.row_bytes);
                    }
                }
        }
        plan.prefetch_lists[thread].n_ranges = static_cast<int64_t>(ranges.size() - first_own);
    }
    const PrefetchRange* next = ranges.data();
    for (PrefetchList& list : plan.prefetch_lists) {
        list.ranges = next;
        next += list.n_ranges;
    }
    return plan.prefetch_lists.data();
}

}  // namespace loraplex
