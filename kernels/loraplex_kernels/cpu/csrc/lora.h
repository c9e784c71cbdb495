// The LoRA operator on raw pointers: what Python passes, and the kernels of one instruction set.
//
//     out[t, n] += w[t, s] · Σ_r B_s[r, n] · (Σ_k A_s[r, k] · x[t, k])   for every segment s of t
//
// Each result has one order of additions: over k in one vector accumulator per (row, rank), its
// lanes by a fixed tree, then over r in twos (`rank_pair.inc`), ascending. Tiles and threads only
// choose which results are computed together, so a row has the same bits alone, in any batch, on any
// number of threads.
#pragma once

#include <cstdint>

#include "compact.h"
#include "isa.h"

namespace loraplex {

constexpr int kPageRank = 16;
constexpr int64_t kNoPage = -1;
constexpr int64_t kTileRows = 4;  // rows that meet a factor together
constexpr int64_t kStreamColumns = 2048;  // of a piece, at most

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1 };

// Mirrored by `_TargetDescriptor` in cpu/lora.py.
struct LoraTargetDescriptor {
    const void* storage;
    const int32_t* ranks;    // [n_slots, n_slices]
    const int64_t* a_pages;  // [n_slots, n_slices, max_pages], + kCompact where a page is so
    const int64_t* b_pages;  // [n_slots, n_slices, max_pages]
    const int64_t* scale;    // [n_slots, n_slices]
    const int64_t* bias;     // [n_slots, n_slices]
    const int64_t* out_features;  // [n_slices]
    int64_t in_features;
    int64_t n_slices;
    int64_t max_pages;
    int64_t n_slots;
    int64_t dtype;  // of storage, x and out
};

// The rows of a step by adapter slot. Mirrored by `_Segments` in cpu/lora.py.
struct LoraSegments {
    const int32_t* slots;    // [n_segments]; negative = padding
    const int32_t* indptr;   // [n_segments + 1]
    const int32_t* indices;  // [n_indices], rows
    const float* weights;    // [n_indices], or null = 1
    int64_t n_segments, n_indices;
};

// Some rows times some rank rows of one page of A.
struct ShrinkArgs {
    const void* x;
    int64_t x_stride;     // elements
    const int32_t* rows;  // [n_rows] into x
    int64_t n_rows;
    const void* a;  // [n_ranks, in_features], or as many compact rows, from a block on
    bool compact;
    void* scratch;  // [n_ranks, in_features] where the rows are compact
    int64_t n_ranks;
    int64_t in_features;
    float* h;  // [n_rows, n_ranks] at stride h_stride, as factors of `RankPair`; an odd last has room for two
    int64_t h_stride;
};

// Adds the product of h and some columns of Bᵀ to some rows of out.
struct ExpandArgs {
    void* out;  // at the first column
    int64_t out_stride;
    const int32_t* rows;  // [n_rows] into out
    const float* weights;  // [n_rows], or null = 1
    int64_t n_rows;
    const float* h;  // [n_rows, rank] at stride h_stride, what shrink made
    int64_t h_stride;
    const void* storage;
    const int64_t* b_pages;
    int64_t rank;
    int64_t width;         // of a row of Bᵀ
    int64_t first_column;  // within the slice
    int64_t n_columns;
    int64_t scale;  // offset of the slice's vector, or kNoPage
    int64_t bias;
    bool in_cache;  // whether B was fetched before
    void* scratch;  // [rank, n_columns] where a page is compact
};

// Adds some rows to one.
struct SumArgs {
    void* out;          // [n_columns]
    const void* delta;  // [n_deltas, n_columns]
    int64_t n_deltas, n_columns;
};

struct LoraKernels {
    void (*shrink[2])(const ShrinkArgs&);  // by DType
    void (*expand[2])(const ExpandArgs&);
    void (*sum[2])(const SumArgs&);
};

extern const LoraKernels kLoraPortable;
#if LORAPLEX_X86
extern const LoraKernels kLoraAvx2;
extern const LoraKernels kLoraAvx512;
extern const LoraKernels kLoraAvx512Bf16;
#endif

}  // namespace loraplex

// See lora.cpp.
LORAPLEX_API int loraplex_adapted_linear(const loraplex::LoraTargetDescriptor* target,
                                         const void* packed, const float* bias, const void* x,
                                         int64_t x_stride, void* out, int64_t out_stride,
                                         int64_t n_rows, const loraplex::LoraSegments* segments);
