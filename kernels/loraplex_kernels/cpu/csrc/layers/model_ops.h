// The arguments of the base model's operators. Layouts: linear.inc and block_formats.h (packed
// weights),
// attention_tile.inc and int8_cache.inc (paged cache).
#pragma once

#include <cstdint>

#include "blocks/block_formats.h"
#include "dispatch/openmp.h"
#include "lora/prefetch.h"

namespace loraplex {

struct LinearArgs {
    const void* x;
    const void* packed;  // coded panels: plus kCoded; panels in blocks: plus kInBlocks
    const float* bias;  // [n_out] padded to whole panels, or null
    void* out;
    int64_t x_stride, out_stride;  // elements
    int64_t n_rows, n_out, n_in;
    const PrefetchList* prefetch;  // [threads], or null: what each of them prefetches meanwhile
    const QuantizedRows* quantized = nullptr;  // rows of x for panels in blocks, where they are ready
};

namespace {
// Threads that a product is worth.
inline int64_t n_linear_threads(const LinearArgs& a) {
    return a.n_rows * a.n_out * a.n_in >= 200000 ? omp_get_max_threads() : 1;
}
}  // namespace

// The largest of some values and its index.
struct Largest {
    float value;
    int64_t index;
};

namespace {
// Keeps the larger, of equal ones the first; a NaN is larger than all else.
inline void keep_larger(Largest& best, Largest other) {
    const bool is_nan = best.value != best.value, other_is_nan = other.value != other.value;
    const bool is_larger = !is_nan && (other_is_nan || other.value > best.value);
    const bool is_equal = is_nan ? other_is_nan : other.value == best.value;
    if (is_larger || (is_equal && other.index < best.index)) best = other;
}
}  // namespace

struct NormArgs {
    const void* x;
    void* residual;  // += x first, and normed instead of it; or null
    const void* weight;
    void* out;
    int64_t n_rows, width;
    float eps, offset;
};

struct GateArgs {
    const void* gate_up;
    void* out;
    int64_t n_rows, width;
    int64_t act;  // 0 silu, 1 gelu_tanh
};

// The top-k experts of rows: softmax over the k largest products with the gate.
struct RouteArgs {
    const void* x;
    int64_t x_stride;  // elements
    int64_t n_rows;
    const float* gate;  // [n_experts, width]
    int64_t n_experts, width, k;
    int* index;     // [n_rows, k]
    float* weight;  // [n_rows, k]
};

// The weighted sums of what k experts made of each row.
struct CombineArgs {
    const void* expert_act;  // [n_rows · k, width]
    const float* weight;     // [n_rows, k]
    const int64_t* rows;   // [n_rows] into act
    void* act;               // rows of `width`
    int64_t n_rows, k, width;
};

// Rotates and caches rows laid out as heads: q (may be none), then k, then v.
struct RopeArgs {
    void* heads;       // rotated in place
    const void* v;     // first v head of row 0
    int64_t stride;       // elements from row to row, of heads
    int64_t v_stride;     // the same, of v
    int64_t n_queries;    // q heads before the k heads
    int64_t n_kv_heads, head_dim, page_size;
    const void* cos;  // [n_positions, rotary_dim], or null
    const void* sin;
    int64_t rotary_dim;
    int64_t wide_tables;  // 1: cos and sin are float32; 0: of the element type
    const int64_t* positions;
    const int64_t* slot_mapping;  // negative = not cached
    void* k_cache;
    void* v_cache;
    int64_t n_rows;
    int64_t is_int8;  // 1: the caches are those of int8_cache.inc; 0: they hold the element type
};

struct AttentionArgs {
    const void* q;
    const void* k_cache;
    const void* v_cache;
    const int* page_table;
    const int* query_starts;
    const int* kv_lens;
    void* out;
    int64_t q_stride, out_stride, table_stride;  // elements
    int64_t n_requests, n_heads, n_kv_heads, head_dim, page_size;
    int64_t window;  // 0 = none
    float scale;
    float softcap;  // 0 = none
    int64_t is_int8;  // see RopeArgs
};

}  // namespace loraplex
