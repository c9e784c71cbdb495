// The base model's operators on raw pointers: what Python passes, and the kernels of one
// instruction set. Layouts: linear.inc (packed weights), attention.inc (paged cache).
#pragma once

#include "compact_panels.h"
#include "fetch.h"
#include "isa.h"

namespace loraplex {

struct LinearArgs {
    const void* x;
    const void* packed;  // compact panels: plus kCompactPanels
    const float* bias;  // [n_out] padded to whole panels, or null
    void* out;
    long x_stride, out_stride;  // elements
    long n_rows, n_out, n_in;
    // Where the lists [threads] of what to fetch will stand, null until they do; or null.
    const FetchList* const* fetch;
};

// Whether a product is worth more than one thread.
namespace {
inline bool is_for_many_threads(long n_rows, long n_out, long n_in) {
    return n_rows * n_out * n_in >= 200000;
}
}  // namespace

// The largest of some values and its place.
struct Largest {
    float value;
    long at;
};

namespace {
// Keeps the larger, of equal ones the first; a NaN is larger than all else.
inline void meet(Largest& best, Largest other) {
    const bool is_nan = best.value != best.value, other_is_nan = other.value != other.value;
    const bool is_larger = !is_nan && (other_is_nan || other.value > best.value);
    const bool is_equal = is_nan ? other_is_nan : other.value == best.value;
    if (is_larger || (is_equal && other.at < best.at)) best = other;
}
}  // namespace

struct NormArgs {
    const void* x;
    void* residual;  // += x first, and normed instead of it; or null
    const void* weight;
    void* out;
    long n_rows, width;
    float eps, offset;
};

struct GateArgs {
    const void* gate_up;
    void* out;
    long n_rows, width;
    long act;  // 0 silu, 1 gelu_tanh
};

// The top-k experts of rows: softmax over the k largest products with the gate.
struct RouteArgs {
    const void* x;
    long x_stride;  // elements
    long n_rows;
    const float* gate;  // [n_experts, width]
    long n_experts, width, k;
    int* index;     // [n_rows, k]
    float* weight;  // [n_rows, k]
};

// The weighted sums of what k experts made of each row.
struct MixArgs {
    const void* expert_act;  // [n_rows · k, width]
    const float* weight;     // [n_rows, k]
    const long long* rows;   // [n_rows] into act
    void* act;               // rows of `width`
    long n_rows, k, width;
};

// Rotates and caches rows laid out as heads: q (may be none), then k, then v.
struct CacheArgs {
    void* heads;       // rotated in place
    const void* v;     // first v head of row 0
    long stride;       // elements from row to row, of heads
    long v_stride;     // the same, of v
    long n_queries;    // q heads before the k heads
    long n_kv_heads, head_dim, page_size;
    const void* cos;  // [n_positions, rotary_dim], or null
    const void* sin;
    long rotary_dim;
    long wide_tables;  // 1: cos and sin are float32; 0: of the element type
    const long long* positions;
    const long long* slots;
    void* k_cache;
    void* v_cache;
    long n_rows;
};

struct AttentionArgs {
    const void* q;
    const void* k_cache;
    const void* v_cache;
    const int* page_table;
    const int* query_starts;
    const int* kv_lens;
    void* out;
    long q_stride, out_stride, table_stride;  // elements
    long n_requests, n_heads, n_kv_heads, head_dim, page_size;
    long window;  // 0 = none
    float scale;
    float softcap;  // 0 = none
};

struct ModelOps {  // each by element type: 0 float32, 1 bfloat16
    void (*linear[2])(const LinearArgs&);
    // The share of one thread of a team; `taken` is theirs and starts at 0.
    void (*linear_part[2])(const LinearArgs&, long n_threads, long* taken);
    // By threads: [omp_get_max_threads(), n_rows], at {-∞, 0} when it begins.
    void (*linear_argmax[2])(const LinearArgs&, Largest*);
    void (*norm[2])(const NormArgs&);
    void (*gate[2])(const GateArgs&);
    void (*gate_row[2])(const GateArgs&);
    void (*cache[2])(const CacheArgs&);
    void (*attention[2])(const AttentionArgs&);
    void (*route[2])(const RouteArgs&);
    void (*mix[2])(const MixArgs&);
};

const ModelOps& model_ops();  // of the current instruction set

extern const ModelOps kModelOpsPortable;
#if LORAPLEX_X86
extern const ModelOps kModelOpsAvx2;
extern const ModelOps kModelOpsAvx512;
extern const ModelOps kModelOpsAvx512Bf16;
#endif

}  // namespace loraplex
