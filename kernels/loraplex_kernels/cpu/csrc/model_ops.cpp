// C entry points of the base model's operators. `dtype`: 0 float32, 1 bfloat16.
#include "model_ops.h"

#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
#endif

namespace loraplex {

const ModelOps& model_ops() {
#if LORAPLEX_X86
    switch (current_isa()) {
        case kAvx512Bf16:
            return kModelOpsAvx512Bf16;
        case kAvx512:
            return kModelOpsAvx512;
        case kAvx2:
            return kModelOpsAvx2;
        default:
            break;
    }
#endif
    return kModelOpsPortable;
}

}  // namespace loraplex

using namespace loraplex;

LORAPLEX_API void loraplex_linear(long dtype, const void* x, long x_stride, const void* packed,
                                  const float* bias, void* out, long out_stride, long n_rows,
                                  long n_out, long n_in) {
    model_ops().linear[dtype]({x, packed, bias, out, x_stride, out_stride, n_rows, n_out, n_in,
                              nullptr});
}

// The place of each row's largest output, to `places` [n_rows].
LORAPLEX_API void loraplex_linear_argmax(long dtype, const void* x, long x_stride, const void* packed,
                                         const float* bias, long n_rows, long n_out, long n_in,
                                         long long* places) {
    const long n_threads = omp_get_max_threads();
    thread_local std::vector<Largest> best;
    best.assign(n_threads * n_rows, {-std::numeric_limits<float>::infinity(), 0});
    model_ops().linear_argmax[dtype](
        {x, packed, bias, nullptr, x_stride, 0, n_rows, n_out, n_in, nullptr}, best.data());
    for (long r = 0; r < n_rows; ++r) {
        for (long thread = 1; thread < n_threads; ++thread) meet(best[r], best[thread * n_rows + r]);
        places[r] = best[r].at;
    }
}

LORAPLEX_API void loraplex_rms_norm(long dtype, const void* x, void* residual, const void* weight,
                                    void* out, long n_rows, long width, float eps, float offset) {
    model_ops().norm[dtype]({x, residual, weight, out, n_rows, width, eps, offset});
}

LORAPLEX_API void loraplex_gate(long dtype, const void* gate_up, void* out, long n_rows, long width,
                                long act) {
    model_ops().gate[dtype]({gate_up, out, n_rows, width, act});
}

LORAPLEX_API void loraplex_rope_and_cache(long dtype, void* heads, const void* v, long stride,
                                          long v_stride, long n_queries, long n_kv_heads,
                                          long head_dim, long page_size, const void* cos,
                                          const void* sin, long rotary_dim, long wide_tables,
                                          const long long* positions, const long long* slots,
                                          void* k_cache, void* v_cache, long n_rows) {
    model_ops().cache[dtype]({heads, v, stride, v_stride, n_queries, n_kv_heads, head_dim, page_size, cos,
                        sin, rotary_dim, wide_tables, positions, slots, k_cache, v_cache, n_rows});
}

LORAPLEX_API void loraplex_paged_attention(
    long dtype, const void* q, long q_stride, const void* k_cache, const void* v_cache,
    const int* page_table, long table_stride, const int* query_starts, const int* kv_lens, void* out,
    long out_stride, long n_requests, long n_heads, long n_kv_heads, long head_dim, long page_size,
    long window, float scale, float softcap) {
    model_ops().attention[dtype]({q, k_cache, v_cache, page_table, query_starts, kv_lens, out, q_stride,
                            out_stride, table_stride, n_requests, n_heads, n_kv_heads, head_dim,
                            page_size, window, scale, softcap});
}

LORAPLEX_API void loraplex_route(long dtype, const void* x, long x_stride, long n_rows,
                                 const float* gate, long n_experts, long width, long k, int* index,
                                 float* weight) {
    model_ops().route[dtype]({x, x_stride, n_rows, gate, n_experts, width, k, index, weight});
}

LORAPLEX_API void loraplex_mix(long dtype, const void* expert_act, const float* weight,
                               const long long* rows, void* act, long n_rows, long k, long width) {
    model_ops().mix[dtype]({expert_act, weight, rows, act, n_rows, k, width});
}

// Pairs by segment, ascending within each; `ids` are in [0, n_segments), `starts` has one more. `load`
// (or null) counts what each segment got.
static void group(const int* ids, const float* weight, long n_pairs, long n_segments, int* starts,
                  int* rows, float* ordered, long long* load) {
    for (long s = 0; s <= n_segments; ++s) starts[s] = 0;
    for (long p = 0; p < n_pairs; ++p) ++starts[ids[p] + 1];
    for (long s = 0; s < n_segments; ++s) {
        if (load) load[s] += starts[s + 1];
        starts[s + 1] += starts[s];
    }
    // Each start moves on to the next segment's while its pairs are dealt, and moves back after.
    for (long p = 0; p < n_pairs; ++p) {
        const int at = starts[ids[p]]++;
        rows[at] = static_cast<int>(p);
        ordered[at] = weight[p];
    }
    for (long s = n_segments; s > 0; --s) starts[s] = starts[s - 1];
    starts[0] = 0;
}

LORAPLEX_API void loraplex_group(const int* ids, const float* weight, long n_pairs, long n_segments,
                                 int* starts, int* rows, float* ordered) {
    group(ids, weight, n_pairs, n_segments, starts, rows, ordered, nullptr);
}

LORAPLEX_API void loraplex_route_and_group(long dtype, const void* x, long x_stride, long n_rows,
                                           const float* gate, long n_experts, long width, long k,
                                           int* index, float* weight, int* starts, int* rows,
                                           float* ordered, long long* load) {
    model_ops().route[dtype]({x, x_stride, n_rows, gate, n_experts, width, k, index, weight});
    group(index, weight, n_rows * k, n_experts, starts, rows, ordered, load);
}
