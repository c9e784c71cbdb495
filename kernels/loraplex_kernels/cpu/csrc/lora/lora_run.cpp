// See lora_run.h; at the end the C interface.
#include "lora/lora_run.h"

#include <algorithm>

namespace loraplex {
namespace {

void run_expand(const LoraCall& call, LoraPlan& plan, const ExpandItem& item) {
    const LoraTarget& t = call.target;
    for (int32_t p = item.first_slice; p < item.last_slice; ++p) {
        const SegmentSlice& slice = plan.slices[p];
        const bool all_rows = item.n_rows == 0;
        const int64_t first_row = all_rows ? 0 : item.first_row;
        const int64_t first_pair = call.indptr[slice.segment] + first_row;
        const int64_t at = call.table_index(slice.segment, slice.slice);
        const int64_t column = plan.first_columns[slice.slice] + item.first_column;
        kernels().expand[t.dtype](
            {call.out + column * call.bytes(), call.out_stride, call.indices + first_pair,
             call.weights ? call.weights + first_pair : nullptr,
             all_rows ? call.n_rows(slice.segment) : item.n_rows,
             plan.h() + slice.h + first_row * slice.h_stride(), slice.h_stride(), t.storage,
             t.b_pages + at * t.max_pages, slice.rank, t.out_features[slice.slice],
             item.first_column, item.n_columns, t.scale[at], t.bias[at],
             scratch(slice.rank * item.n_columns * call.bytes())});
    }
}

void expand_task(const LoraCall& call, LoraPlan& plan, const SegmentTask& task) {
    for (int32_t p = task.first_slice; p < task.last_slice; ++p) {
        const int64_t width = call.target.out_features[plan.slices[p].slice];
        for (int64_t column = 0; column < width; column += kExpandColumns)
            run_expand(call, plan,
                       {p, p + 1, task.first_row, task.n_rows, column,
                        std::min(kExpandColumns, width - column)});
    }
}

LinearArgs with_prefetch(LinearArgs base, const LoraCall& call, LoraPlan& plan) {
    base.prefetch = list_prefetches(call, plan);
    return base;
}

// The base's product and the tasks of a call by one team of threads. Shrinking does not read what the
// product makes, so a thread that has no panel left begins with it instead of waiting for the others.
void run_as_one_team(const LinearArgs& base, const LoraCall& call, LoraPlan& plan) {
    const int n_threads = plan.n_threads;
    int64_t n_taken = 0;
#pragma omp parallel num_threads(n_threads)
    {
        const int thread = omp_get_thread_num();
        kernels().linear_part[call.target.dtype](base, n_threads, &n_taken);
        plan.shrink_queue.work(thread, [&](size_t i) { shrink_task(call, plan, plan.tasks[i]); });
#pragma omp barrier
        plan.expand_queue.work(thread, [&](size_t i) { expand_task(call, plan, plan.tasks[i]); });
    }
}

}  // namespace

void* scratch(int64_t n_bytes) {
    thread_local std::vector<char> bytes;
    if (static_cast<int64_t>(bytes.size()) < n_bytes) bytes.resize(n_bytes);
    return bytes.data();
}

void run_shrink(const LoraCall& call, LoraPlan& plan, const ShrinkItem& item) {
    const LoraTarget& t = call.target;
    const SegmentSlice& slice = plan.slices[item.slice];
    const RankRows a = rank_rows(call, slice, t.a_pages, item.page, item.first_rank, t.in_features);
    kernels().shrink[t.dtype](
        {call.x, call.x_stride, call.x_rows + call.indptr[slice.segment] + item.first_row, item.n_rows,
         a.first, a.coded, a.coded ? scratch(item.n_ranks * t.in_features * call.bytes()) : nullptr,
         item.n_ranks, t.in_features,
         plan.h() + slice.h + item.first_row * slice.h_stride() + item.page * kPageRank +
             item.first_rank,
         slice.h_stride()});
}

void shrink_task(const LoraCall& call, LoraPlan& plan, const SegmentTask& task) {
    for (int32_t p = task.first_slice; p < task.last_slice; ++p)
        for (int64_t first = 0, rank = plan.slices[p].rank; first < rank; first += kPageRank)
            run_shrink(call, plan,
                       {p, static_cast<int32_t>(first / kPageRank), task.first_row, task.n_rows, 0,
                        static_cast<int32_t>(std::min<int64_t>(kPageRank, rank - first))});
}

void run_lora(const LoraCall& call, LoraPlan& plan) {
    if (plan.partition == Partition::kNothing) return;
    const bool by_task = plan.partition == Partition::kSegmentTasks;
    const int n_threads = plan.n_threads;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
        const int thread = omp_get_thread_num();
        if (by_task) {
            plan.shrink_queue.work(thread, [&](size_t i) {
                shrink_task(call, plan, plan.tasks[i]);
                expand_task(call, plan, plan.tasks[i]);
            });
        } else {
            plan.shrink_queue.work(thread,
                                   [&](size_t i) { run_shrink(call, plan, plan.shrink_items[i]); });
#pragma omp barrier
            plan.expand_queue.work(thread,
                                   [&](size_t i) { run_expand(call, plan, plan.expand_items[i]); });
        }
    }
}

void run_base_and_plan(const LinearArgs& base, const LoraCall& call, LoraPlan& plan, int64_t n_rows) {
    plan_lora(call, plan, n_rows);
    kernels().linear[call.target.dtype](with_prefetch(base, call, plan));
}

int linear_with_lora(const LinearArgs& base, const LoraTarget& target, const LoraSegments& segments) {
    LoraPlan& plan = own_plan();
    const LoraCall call(target, base.x, base.x_stride, base.out, base.out_stride, segments);
    if (const int failed = check_segments(call, base.n_rows)) return failed;
    plan_lora(call, plan, base.n_rows);
    const LinearArgs product = with_prefetch(base, call, plan);
    const int64_t n_threads = n_linear_threads(product);
    if (plan.partition == Partition::kSegmentTasks && n_threads > 1 && plan.n_threads == n_threads) {
        run_as_one_team(product, call, plan);
    } else {
        kernels().linear[target.dtype](product);
        run_lora(call, plan);
    }
    return 0;
}

}  // namespace loraplex

// Adds to `out` in place. Strides count elements. Returns 0, or which check failed.
LORAPLEX_API int loraplex_lora_apply(const loraplex::LoraTarget* target, const void* x,
                                     int64_t x_stride, void* out, int64_t out_stride, int64_t n_rows,
                                     const loraplex::LoraSegments* segments) {
    loraplex::LoraPlan& plan = loraplex::own_plan();
    const loraplex::LoraCall call(*target, x, x_stride, out, out_stride, *segments);
    if (const int failed = loraplex::check_segments(call, n_rows)) return failed;
    loraplex::plan_lora(call, plan, n_rows);
    loraplex::run_lora(call, plan);
    return 0;
}

// The base's product into `out`, then the same on top. `packed` and `bias` as in `loraplex_linear`, of
// the target's dtype.
LORAPLEX_API int loraplex_linear_with_lora(const loraplex::LoraTarget* target, const void* packed,
                                           const float* bias, const void* x, int64_t x_stride,
                                           void* out, int64_t out_stride, int64_t n_rows,
                                           const loraplex::LoraSegments* segments) {
    int64_t n_out = 0;
    for (int64_t i = 0; i < target->n_slices; ++i) n_out += target->out_features[i];
    return loraplex::linear_with_lora({x, packed, bias, out, x_stride, out_stride, n_rows, n_out,
                                       target->in_features, nullptr},
                                      *target, *segments);
}
