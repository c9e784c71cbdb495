// MLPs with routed experts. A pair is a row of the step as one of its experts sees it; pairs take the
// place of rows in the segments.
#include <algorithm>
#include <cstring>

#include "lora/lora_run.h"

namespace loraplex {
namespace {

template <typename Row>
bool rows_are_in(const Row* rows, int64_t n, int64_t n_rows) {
    for (int64_t i = 0; i < n; ++i)
        if (rows[i] < 0 || rows[i] >= n_rows) return false;
    return true;
}

// act[p] = silu(gate) ⊙ up of the base's row of pair p with the segments' products on top.
struct GatedPairs {
    const LoraCall& call;  // its `out` holds the pairs where they are cut into work items
    const char* base;
    int64_t base_stride;  // bytes
    char* act;
    int64_t act_stride;  // bytes

    int64_t row_bytes() const { return call.n_columns() * call.bytes(); }
    const char* base_row(int64_t position) const {  // of a position in `call.indices`
        return base + call.x_rows[position] * base_stride;
    }
    void finish(const char* gate_up, int64_t position) const {
        kernels().gate_row[call.target.dtype]({gate_up, act + call.indices[position] * act_stride, 1,
                                               call.target.out_features[0], 0});
    }
};

// A few pairs at a time, whose rows never leave the first caches of the thread.
void run_gated_task(const GatedPairs& gated, LoraPlan& plan, const SegmentTask& task, char* rows) {
    static const int32_t kRowsInOrder[kRowsTogether] = {0, 1, 2, 3};
    const LoraCall& call = gated.call;
    const LoraTarget& t = call.target;
    const int64_t row_bytes = gated.row_bytes(), segment = plan.slices[task.first_slice].segment;
    const int64_t end = task.first_row + task.n_rows;
    for (int64_t row = task.first_row; row < end; row += kRowsTogether) {
        const int64_t n_rows = std::min(kRowsTogether, end - row);
        const int64_t position = call.indptr[segment] + row;
        for (int64_t i = 0; i < n_rows; ++i)
            std::memcpy(rows + i * row_bytes, gated.base_row(position + i), row_bytes);
        shrink_task(call, plan, {task.first_slice, task.last_slice, row, n_rows, 0});
        for (int32_t p = task.first_slice; p < task.last_slice; ++p) {
            const SegmentSlice& slice = plan.slices[p];
            const int64_t at = call.table_index(segment, slice.slice);
            const int64_t width = t.out_features[slice.slice];
            for (int64_t column = 0; column < width; column += kExpandColumns) {
                const int64_t n = std::min(kExpandColumns, width - column);
                kernels().expand[t.dtype](
                    {rows + (plan.first_columns[slice.slice] + column) * call.bytes(),
                     call.n_columns(), kRowsInOrder, nullptr, n_rows,
                     plan.h() + slice.h + row * slice.h_stride(), slice.h_stride(), t.storage,
                     t.b_pages + at * t.max_pages, slice.rank, width, column, n, t.scale[at],
                     t.bias[at], scratch(slice.rank * n * call.bytes())});
            }
        }
        for (int64_t i = 0; i < n_rows; ++i) gated.finish(rows + i * row_bytes, position + i);
    }
}

// Pairs of segments that change nothing.
void run_unchanged_pairs(const GatedPairs& gated) {
    const LoraCall& call = gated.call;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        bool changes = false;
        for (int64_t i = 0; call.slots[s] >= 0 && i < call.target.n_slices; ++i)
            changes |= call.has_work(s, i);
        for (int64_t p = call.indptr[s]; !changes && p < call.indptr[s + 1]; ++p)
            gated.finish(gated.base_row(p), p);
    }
}

void run_gated(const GatedPairs& gated, LoraPlan& plan, int64_t n_pairs) {
    const LoraCall& call = gated.call;
    const int64_t row_bytes = gated.row_bytes();
    const int n_threads = plan.n_threads;
    if (plan.partition != Partition::kWorkItems) {
        run_unchanged_pairs(gated);
        if (plan.partition == Partition::kNothing) return;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
        {
            thread_local std::vector<char> rows;
            rows.resize(std::max<size_t>(rows.size(), kRowsTogether * row_bytes));
            plan.shrink_queue.work(omp_get_thread_num(), [&](size_t i) {
                run_gated_task(gated, plan, plan.tasks[i], rows.data());
            });
        }
        return;
    }
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int64_t p = 0; p < n_pairs; ++p)
        std::memcpy(call.out + call.indices[p] * row_bytes, gated.base_row(p), row_bytes);
    run_lora(call, plan);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int64_t p = 0; p < n_pairs; ++p) gated.finish(call.out + call.indices[p] * row_bytes, p);
}

// out[pair_rows[p]] += delta[p], over the neighbouring pairs of a row at once.
void add_pairs(const LoraCall& call, const int64_t* pair_rows, int64_t n_pairs, char* out,
               int64_t out_stride) {
    constexpr int64_t kSerialElements = 64 << 10;
    const int64_t bytes = call.bytes(), width = call.n_columns();
#pragma omp parallel for schedule(static) if (n_pairs * width > kSerialElements)
    for (int64_t p = 0; p < n_pairs; ++p) {
        if (p > 0 && pair_rows[p] == pair_rows[p - 1]) continue;
        int64_t end = p + 1;
        while (end < n_pairs && pair_rows[end] == pair_rows[p]) ++end;
        kernels().sum[call.target.dtype]({out + pair_rows[p] * out_stride * bytes,
                                          call.out + p * width * bytes, end - p, width});
    }
}

}  // namespace
}  // namespace loraplex

// The base's gate and up products into `out`, and for every pair silu(gate) ⊙ up of its row of them with
// the segments' product of its row of x on top, without weights. Segments hold every pair once. Returns
// 0, or which check failed.
LORAPLEX_API int loraplex_moe_gate_up(const loraplex::LoraTarget* target, const void* packed,
                                      const float* bias, const void* x, int64_t x_stride, void* out,
                                      int64_t out_stride, int64_t n_rows,
                                      const loraplex::LoraSegments* segments,
                                      const int64_t* pair_rows, int64_t n_pairs, void* act,
                                      int64_t act_stride) {
    using namespace loraplex;
    LoraPlan& plan = own_plan();
    LoraCall call(*target, x, x_stride, nullptr, 0, *segments);
    const int64_t width = call.n_columns(), bytes = call.bytes();
    if (!rows_are_in(pair_rows, n_pairs, n_rows)) return 4;
    if (const int failed = check_segments(call, n_pairs)) return failed;
    if (call.indptr[0] != 0 || call.indptr[call.n_segments] != n_pairs ||
        !rows_are_in(call.indices, n_pairs, n_pairs))
        return 5;
    plan.pairs.resize(n_pairs * width * bytes);
    plan.x_rows.resize(n_pairs);
    for (int64_t i = 0; i < n_pairs; ++i)
        plan.x_rows[i] = static_cast<int32_t>(pair_rows[call.indices[i]]);
    call.out = plan.pairs.data();
    call.out_stride = width;
    call.weights = nullptr;
    call.x_rows = plan.x_rows.data();
    run_base_and_plan({x, packed, bias, out, x_stride, out_stride, n_rows, width, target->in_features,
                       nullptr},
                      call, plan, n_pairs);
    run_gated({call, static_cast<const char*>(out), out_stride * bytes, static_cast<char*>(act),
               act_stride * bytes},
              plan, n_pairs);
    return 0;
}

// The base's product of x into `out`, and on every row of it the sum over its pairs of the segments'
// product of the pair's row of `pairs`. Pairs of one row are neighbours. Returns 0, or which check failed.
LORAPLEX_API int loraplex_moe_down(const loraplex::LoraTarget* target, const void* packed,
                                   const float* bias, const void* x, int64_t x_stride, void* out,
                                   int64_t out_stride, int64_t n_rows,
                                   const loraplex::LoraSegments* segments, const int64_t* pair_rows,
                                   int64_t n_pairs, const void* pairs, int64_t pair_stride) {
    using namespace loraplex;
    LoraPlan& plan = own_plan();
    LoraCall call(*target, pairs, pair_stride, nullptr, 0, *segments);
    if (!rows_are_in(pair_rows, n_pairs, n_rows)) return 4;
    if (const int failed = check_segments(call, n_pairs)) return failed;
    const int64_t width = call.n_columns();
    plan.pairs.assign(n_pairs * width * call.bytes(), 0);
    call.out = plan.pairs.data();
    call.out_stride = width;
    run_base_and_plan({x, packed, bias, out, x_stride, out_stride, n_rows, width, target->in_features,
                       nullptr},
                      call, plan, n_pairs);
    run_lora(call, plan);
    add_pairs(call, pair_rows, n_pairs, static_cast<char*>(out), out_stride);
    return 0;
}
