// The LoRA operator on raw pointers: what Python passes, and what the kernels are given.
//
//     out[t, n] += w[t, s] · Σ_r B_s[r, n] · (Σ_k A_s[r, k] · x[t, k])   for every segment s of t
//
// Each result has one order of additions: over k in one vector accumulator per (row, rank), its lanes
// by a fixed tree, then over r, ascending. Tiles and threads only choose which results are computed
// together, so a row has the same bits alone, in any batch, on any number of threads.
#pragma once

#include <cstdint>

namespace loraplex {

constexpr int64_t kPageRank = 16;
constexpr int64_t kNoPage = -1;
constexpr int64_t kRowsTogether = 4;      // rows that meet a factor together, at most
constexpr int64_t kExpandColumns = 2048;  // of one call of `expand`, at most

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1 };
inline int64_t element_bytes(int64_t dtype) { return dtype == kBFloat16 ? 2 : 4; }

// A target of the pool. Offsets count elements of the storage; offsets of coded pages are odd.
struct LoraTarget {
    const void* storage;
    const int32_t* ranks;         // [n_slots, n_slices]
    const int64_t* a_pages;       // [n_slots, n_slices, max_pages]
    const int64_t* b_pages;       // [n_slots, n_slices, max_pages]
    const int64_t* scale;         // [n_slots, n_slices], or kNoPage
    const int64_t* bias;          // [n_slots, n_slices], or kNoPage
    const int64_t* out_features;  // [n_slices]
    int64_t in_features;
    int64_t n_slices;
    int64_t max_pages;
    int64_t n_slots;
    int64_t dtype;  // of storage, x and out
};

// The rows of a step by adapter slot.
struct LoraSegments {
    const int32_t* slots;    // [n_segments]; negative = padding
    const int32_t* indptr;   // [n_segments + 1]
    const int32_t* indices;  // [n_indices], rows
    const float* weights;    // [n_indices], or null = 1
    int64_t n_segments, n_indices;
};

// h[t, r] = Σ_k A[r, k] · x[t, k], for some rows and some rank rows of one page.
struct ShrinkArgs {
    const void* x;
    int64_t x_stride;     // elements
    const int32_t* rows;  // [n_rows] into x
    int64_t n_rows;
    const void* a;  // [n_ranks, in_features], or as many coded rows, from a block on
    bool coded;
    void* scratch;  // [n_ranks, in_features] elements, where the rows are coded
    int64_t n_ranks;
    int64_t in_features;
    float* h;  // [n_rows, n_ranks] at stride h_stride
    int64_t h_stride;
};

// out[t, n] += weights[t] · Σ_r h[t, r] · Bᵀ[r, n], then · scale[n] + bias[n], for some rows and
// columns.
struct ExpandArgs {
    void* out;  // at the first column
    int64_t out_stride;
    const int32_t* rows;   // [n_rows] into out
    const float* weights;  // [n_rows], or null = 1
    int64_t n_rows;
    const float* h;  // [n_rows, rank] at stride h_stride
    int64_t h_stride;
    const void* storage;
    const int64_t* b_pages;
    int64_t rank;
    int64_t width;         // of a row of Bᵀ
    int64_t first_column;  // within the slice
    int64_t n_columns;
    int64_t scale;  // offset of the slice's vector, or kNoPage
    int64_t bias;
    void* scratch;  // [rank, n_columns] elements, for coded pages
};

// out[n] += delta[0, n] + delta[1, n] + …, in that order, rounded once.
struct SumArgs {
    void* out;          // [n_columns]
    const void* delta;  // [n_deltas, n_columns]
    int64_t n_deltas, n_columns;
};

}  // namespace loraplex
