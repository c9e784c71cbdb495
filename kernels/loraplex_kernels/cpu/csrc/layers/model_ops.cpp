// C functions of the base model's operators. `dtype` is a DType. Strides count elements.
#include "layers/model_ops.h"

#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "dispatch/kernel_set.h"

using namespace loraplex;

LORAPLEX_API void loraplex_linear(int64_t dtype, const void* x, int64_t x_stride, const void* packed,
                                  const float* bias, void* out, int64_t out_stride, int64_t n_rows,
                                  int64_t n_out, int64_t n_in) {
    kernels().linear[dtype](
        {x, packed, bias, out, x_stride, out_stride, n_rows, n_out, n_in, nullptr});
}

// The index of each row's largest output, to `index` [n_rows]. Row r of `masks` (or null), a word for
// 32 outputs, says by its bits which count; `index` may be n_out if none that counts is above -∞.
LORAPLEX_API void loraplex_linear_argmax(int64_t dtype, const void* x, int64_t x_stride,
                                         const void* packed, const float* bias, int64_t n_rows,
                                         int64_t n_out, int64_t n_in, const uint32_t* masks,
                                         int64_t mask_stride, int64_t* index) {
    const int64_t n_threads = omp_get_max_threads();
    thread_local std::vector<Largest> best;
    const int64_t none = masks ? n_out : 0;
    best.assign(n_threads * n_rows, {-std::numeric_limits<float>::infinity(), none});
    kernels().linear_argmax[dtype](
        {x, packed, bias, nullptr, x_stride, 0, n_rows, n_out, n_in, nullptr}, masks, mask_stride,
        best.data());
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t thread = 1; thread < n_threads; ++thread)
            keep_larger(best[r], best[thread * n_rows + r]);
        index[r] = best[r].index;
    }
}

LORAPLEX_API void loraplex_rms_norm(int64_t dtype, const void* x, void* residual, const void* weight,
                                    void* out, int64_t n_rows, int64_t width, float eps,
                                    float offset) {
    kernels().norm[dtype]({x, residual, weight, out, n_rows, width, eps, offset});
}

LORAPLEX_API void loraplex_gate(int64_t dtype, const void* gate_up, void* out, int64_t n_rows,
                                int64_t width, int64_t act) {
    kernels().gate[dtype]({gate_up, out, n_rows, width, act});
}

LORAPLEX_API void loraplex_rope_and_cache(int64_t dtype, void* heads, const void* v, int64_t stride,
                                          int64_t v_stride, int64_t n_queries, int64_t n_kv_heads,
                                          int64_t head_dim, int64_t page_size, const void* cos,
                                          const void* sin, int64_t rotary_dim, int64_t wide_tables,
                                          const int64_t* positions, const int64_t* slot_mapping,
                                          void* k_cache, void* v_cache, int64_t n_rows,
                                          int64_t is_int8) {
    kernels().rope_and_cache[dtype]({heads, v, stride, v_stride, n_queries, n_kv_heads, head_dim,
                                     page_size, cos, sin, rotary_dim, wide_tables, positions,
                                     slot_mapping, k_cache, v_cache, n_rows, is_int8});
}

LORAPLEX_API void loraplex_paged_attention(
    int64_t dtype, const void* q, int64_t q_stride, const void* k_cache, const void* v_cache,
    const int* page_table, int64_t table_stride, const int* query_starts, const int* kv_lens,
    void* out, int64_t out_stride, int64_t n_requests, int64_t n_heads, int64_t n_kv_heads,
    int64_t head_dim, int64_t page_size, int64_t window, float scale, float softcap,
    int64_t is_int8) {
    kernels().attention[dtype]({q, k_cache, v_cache, page_table, query_starts, kv_lens, out, q_stride,
                                out_stride, table_stride, n_requests, n_heads, n_kv_heads, head_dim,
                                page_size, window, scale, softcap, is_int8});
}

LORAPLEX_API void loraplex_route(int64_t dtype, const void* x, int64_t x_stride, int64_t n_rows,
                                 const float* gate, int64_t n_experts, int64_t width, int64_t k,
                                 int* index, float* weight) {
    kernels().route[dtype]({x, x_stride, n_rows, gate, n_experts, width, k, index, weight});
}

LORAPLEX_API void loraplex_moe_combine(int64_t dtype, const void* expert_act, const float* weight,
                                       const int64_t* rows, void* act, int64_t n_rows, int64_t k,
                                       int64_t width) {
    kernels().moe_combine[dtype]({expert_act, weight, rows, act, n_rows, k, width});
}

// Pairs by segment, ascending within each; `ids` are in [0, n_segments), `indptr` has one more. `load`
// (or null) counts what each segment got.
static void group(const int* ids, const float* weight, int64_t n_pairs, int64_t n_segments,
                  int* indptr, int* indices, float* ordered, int64_t* load) {
    for (int64_t s = 0; s <= n_segments; ++s) indptr[s] = 0;
    for (int64_t p = 0; p < n_pairs; ++p) ++indptr[ids[p] + 1];
    for (int64_t s = 0; s < n_segments; ++s) {
        if (load) load[s] += indptr[s + 1];
        indptr[s + 1] += indptr[s];
    }
    // Each start moves on to the next segment's while its pairs are placed, and moves back after.
    for (int64_t p = 0; p < n_pairs; ++p) {
        const int at = indptr[ids[p]]++;
        indices[at] = static_cast<int>(p);
        ordered[at] = weight[p];
    }
    for (int64_t s = n_segments; s > 0; --s) indptr[s] = indptr[s - 1];
    indptr[0] = 0;
}

LORAPLEX_API void loraplex_group(const int* ids, const float* weight, int64_t n_pairs,
                                 int64_t n_segments, int* indptr, int* indices, float* ordered) {
    group(ids, weight, n_pairs, n_segments, indptr, indices, ordered, nullptr);
}

LORAPLEX_API void loraplex_route_and_group(int64_t dtype, const void* x, int64_t x_stride,
                                           int64_t n_rows, const float* gate, int64_t n_experts,
                                           int64_t width, int64_t k, int* index, float* weight,
                                           int* indptr, int* indices, float* ordered, int64_t* load) {
    kernels().route[dtype]({x, x_stride, n_rows, gate, n_experts, width, k, index, weight});
    group(index, weight, n_rows * k, n_experts, indptr, indices, ordered, load);
}

// The weighted sums of gated MLPs: row r of `out` [n_rows, hidden] is the sum over its choices j of
// weight[r, j] times W_down (silu(W_gate x) · W_up x) of expert index[r, j]. `gate_up` and `down` have the
// packed weights of each expert, [2 width, hidden] and [hidden, width]. An expert's rows are
// multiplied together, and each row's choices are summed in order.
LORAPLEX_API void loraplex_experts(int64_t dtype, const void* x, int64_t n_rows, int64_t hidden,
                                   int64_t width, int64_t n_experts, int64_t k,
                                   const void* const* gate_up, const void* const* down,
                                   const int* index, const float* weight, void* out) {
    const int64_t n_pairs = n_rows * k, element = element_bytes(dtype);
    const int64_t row_bytes = hidden * element, inner_bytes = width * element;
    thread_local std::vector<int> numbers;
    thread_local std::vector<float> ordered;
    thread_local std::vector<int64_t> rows;
    thread_local std::vector<char> memory;
    numbers.resize(n_experts + 1 + n_pairs);
    ordered.resize(n_pairs);
    rows.resize(n_rows);
    memory.resize(n_pairs * (2 * row_bytes + 3 * inner_bytes));
    int* indptr = numbers.data();
    int* pairs = indptr + n_experts + 1;
    group(index, weight, n_pairs, n_experts, indptr, pairs, ordered.data(), nullptr);
    char* grouped = memory.data();  // inputs by expert, and later the outputs
    char* by_pair = grouped + n_pairs * row_bytes;
    char* both = by_pair + n_pairs * row_bytes;
    char* inner = both + n_pairs * 2 * inner_bytes;
    const auto multiply = [&](const void* const* packed, const char* from, int64_t n_in, char* to,
                              int64_t n_out) {
        for (int64_t e = 0; e < n_experts; ++e) {
            const int64_t first = indptr[e], n = indptr[e + 1] - first;
            if (n == 0) continue;
            kernels().linear[dtype]({from + first * n_in * element, packed[e], nullptr,
                                     to + first * n_out * element, n_in, n_out, n, n_out, n_in,
                                     nullptr});
        }
    };
    for (int64_t i = 0; i < n_pairs; ++i)
        std::memcpy(grouped + i * row_bytes, static_cast<const char*>(x) + pairs[i] / k * row_bytes,
                    row_bytes);
    multiply(gate_up, grouped, hidden, both, 2 * width);
    kernels().gate[dtype]({both, inner, n_pairs, width, 0});
    multiply(down, inner, width, grouped, hidden);
    for (int64_t i = 0; i < n_pairs; ++i)
        std::memcpy(by_pair + pairs[i] * row_bytes, grouped + i * row_bytes, row_bytes);
    std::iota(rows.begin(), rows.end(), 0);
    kernels().moe_combine[dtype]({by_pair, weight, rows.data(), out, n_rows, k, hidden});
}
