// Llama-style decoder layers in one call: what Python passes. Mirrored in cpu/decoder.py.
#pragma once

#include "lora/lora.h"

namespace loraplex {

// A packed linear of the base in the layout of linear.inc, with its target in the pool.
struct DecoderLinear {
    const void* packed;
    const float* bias;       // or null
    const LoraTarget* lora;  // or null: no adapter pool
    int64_t n_in, n_out;
};

struct DecoderLayer {
    DecoderLinear qkv, out, gate_up, down;
    const void* input_norm;  // weights of the norms
    const void* mlp_norm;
    void* keys;  // of the paged cache
    void* values;
    int64_t window;  // 0 = none
    double input_eps, mlp_eps, scale;
};

struct Decoder {
    const DecoderLayer* layers;
    int64_t n_layers;
    const void* norm;  // after the last layer
    const float* cos;  // [n_positions, head_dim]
    const float* sin;
    int64_t n_heads, n_kv_heads, head_dim, page_size;
    int64_t dtype;
    int64_t is_int8;  // 1: keys and values are those of int8_cache.inc
    double eps;
};

// The rows of one step. Everything a layer writes but `residual` and `x` is scratch.
struct DecoderStep {
    int64_t n_rows;
    void* residual;  // [n_rows, hidden]: embeddings, changed in place
    void* x;         // [n_rows, hidden]: the result, in its first rows where not all are kept
    void* y;         // [n_rows, hidden]
    void* qkv;       // [n_rows, (n_heads + 2 n_kv_heads) head_dim]
    void* heads;     // [n_rows, n_heads · head_dim]
    void* gate_up;   // [n_rows, 2 ff]
    void* act;       // [n_rows, ff]
    const int64_t* positions;     // [n_rows]
    const int64_t* slot_mapping;  // [n_rows]
    const int* page_table;        // [n_requests, ≥ pages]
    int64_t table_stride;
    const int* query_starts;  // [n_requests + 1]
    const int* kv_lens;       // [n_requests]
    int64_t n_requests;
    LoraSegments segments;  // of no segments where no row has an adapter
    // Rows whose result is asked for, ascending; they come first in x. The others go behind the
    // attention of the last layer, as only their keys and values are needed. n_rows: none go.
    const int64_t* logits_indices;  // [n_logits]
    int64_t n_logits;
    LoraSegments logits_segments;  // of x's first n_logits rows
    const uint8_t* pauses;  // [n_layers], 1 = the caller runs the MLP of the layer; or null
    const void* mlp;        // [n_rows, hidden]: what it made, see `loraplex_decoder`
};

}  // namespace loraplex
