// Cuts one LoRA call into pieces of work and runs them on torch's threads.

#include "lora.h"

#include <algorithm>
#include <atomic>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif

namespace loraplex {
namespace {

constexpr int64_t kRowBlock = 64;           // rows of one piece: their x and h stay in L2
constexpr int64_t kRankStep = 8;            // smallest cut of a page
constexpr int64_t kColumnStep = 64;         // smallest cut of a slice; a cache line never has two owners
#ifndef PB
#define PB 16
#endif
constexpr int64_t kPieceBytes = PB << 10;   // of factors, at most
constexpr int64_t kPiecesPerThread = 6;     // enough that one slow thread delays nobody long
constexpr int64_t kSerialWork = 64 << 10;   // multiply-adds below which threads cost more than they bring
#ifndef AH
#define AH 8
#endif
constexpr int64_t kAheadBytes = AH << 10;    // memory's latency times a core's share of its bandwidth

struct Call {
    const LoraTargetDescriptor& target;
    const void* x;
    int64_t x_stride;
    char* out;
    int64_t out_stride;
    const int32_t* entries;
    const int32_t* starts;
    const int32_t* rows;
    const float* weights;
    int64_t n_segments;
};

// The work of one segment on one slice.
struct Part {
    int64_t segment, slice, rank, h;  // h: offset of [n_rows, stride] in the scratch
};

struct ShrinkPiece {
    int32_t part, page;
    int64_t first_row, n_rows;
    int32_t first_rank, n_ranks;  // within the page
};

// Either one part (`last_part` = `part` + 1) or, where rows stand in several segments, the same
// columns of all parts of one slice, in order.
struct ExpandPiece {
    int32_t part, last_part;
    int64_t first_row, n_rows;
    int64_t first_column, n_columns;
};

// The pieces one thread begins with: a contiguous share. Whoever is done takes from the others, so
// that a thread that the system held up delays nobody by more than a piece.
struct alignas(64) Share {
    std::atomic<size_t> next{0};
    size_t end = 0;
};

struct Plan {
    std::vector<Part> parts;
    std::vector<ShrinkPiece> shrink;
    std::vector<ExpandPiece> expand;
    std::vector<float> h;
    std::vector<int64_t> slice_starts;
    std::vector<Share> shares;  // of the shrink pieces, then of the expand pieces
    std::vector<int64_t> row_seen;  // the call that saw the row last
    int64_t call = 0;
    int64_t work = 0;  // multiply-adds
};

int64_t element_bytes(const Call& call) { return call.target.dtype == kBFloat16 ? 2 : 4; }
int64_t h_stride(int64_t rank) { return (rank + 15) / 16 * 16; }
int64_t row_count(const Call& call, int64_t s) { return call.starts[s + 1] - call.starts[s]; }

bool has_work(const LoraTargetDescriptor& t, int64_t at) {
    return t.ranks[at] > 0 || t.scale[at] != kNoPage || t.bias[at] != kNoPage;
}

// Parts ordered by segment, then slice; null scratch offsets for rank 0. Returns the scratch size.
int64_t list_parts(const Call& call, Plan& plan) {
    const LoraTargetDescriptor& t = call.target;
    plan.parts.clear();
    plan.work = 0;
    int64_t h = 0;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        const int64_t n_rows = row_count(call, s);
        if (call.entries[s] < 0 || n_rows == 0) continue;
        for (int64_t i = 0; i < t.n_slices; ++i) {
            const int64_t at = call.entries[s] * t.n_slices + i;
            if (!has_work(t, at)) continue;
            const int64_t rank = t.ranks[at];
            plan.parts.push_back({s, i, rank, h});
            h += n_rows * h_stride(rank);
            plan.work += n_rows * (rank * (t.in_features + t.out_features[i]) + t.out_features[i]);
        }
    }
    return h;
}

void cut_shrink(const Call& call, Plan& plan, int64_t n_threads) {
    plan.shrink.clear();
    int64_t n_pages = 0;
    for (const Part& part : plan.parts)
        n_pages += (part.rank + kPageRank - 1) / kPageRank *
                   ((row_count(call, part.segment) + kRowBlock - 1) / kRowBlock);
    const int64_t step = n_pages < kPiecesPerThread * n_threads && n_threads > 1 ? kRankStep : kPageRank;
    for (size_t p = 0; p < plan.parts.size(); ++p) {
        const Part& part = plan.parts[p];
        const int64_t n_rows = row_count(call, part.segment);
        for (int64_t row = 0; row < n_rows; row += kRowBlock)
            for (int64_t first = 0; first < part.rank; first += step)
                plan.shrink.push_back({static_cast<int32_t>(p), static_cast<int32_t>(first / kPageRank),
                                       row, std::min(kRowBlock, n_rows - row),
                                       static_cast<int32_t>(first % kPageRank),
                                       static_cast<int32_t>(std::min(step, part.rank - first))});
    }
}

// Columns of one piece: few enough for its bytes and for `wanted` pieces of the slice.
int64_t column_step(int64_t width, int64_t rank, int64_t wanted, int64_t bytes) {
    const int64_t fit = kPieceBytes / (std::max<int64_t>(rank, 1) * bytes);
    const int64_t even = (width + wanted - 1) / wanted;
    return std::max(kColumnStep, (std::min(fit, even) + kColumnStep - 1) / kColumnStep * kColumnStep);
}

void cut_expand_by_part(const Call& call, Plan& plan, int64_t n_threads) {
    int64_t n_blocks = 0;
    for (const Part& part : plan.parts)
        n_blocks += (row_count(call, part.segment) + kRowBlock - 1) / kRowBlock;
    const int64_t wanted =
        n_threads > 1 ? (kPiecesPerThread * n_threads + n_blocks - 1) / std::max<int64_t>(n_blocks, 1) : 1;
    for (size_t p = 0; p < plan.parts.size(); ++p) {
        const Part& part = plan.parts[p];
        const int64_t n_rows = row_count(call, part.segment);
        const int64_t width = call.target.out_features[part.slice];
        const int64_t step = column_step(width, part.rank, wanted, element_bytes(call));
        for (int64_t row = 0; row < n_rows; row += kRowBlock)
            for (int64_t column = 0; column < width; column += step)
                plan.expand.push_back({static_cast<int32_t>(p), static_cast<int32_t>(p + 1), row,
                                       std::min(kRowBlock, n_rows - row), column,
                                       std::min(step, width - column)});
    }
}

void cut_expand_by_column(const Call& call, Plan& plan, int64_t n_threads) {
    const LoraTargetDescriptor& t = call.target;
    std::stable_sort(plan.parts.begin(), plan.parts.end(),
                     [](const Part& a, const Part& b) { return a.slice < b.slice; });
    for (size_t p = 0; p < plan.parts.size();) {
        size_t end = p;
        while (end < plan.parts.size() && plan.parts[end].slice == plan.parts[p].slice) ++end;
        const int64_t width = t.out_features[plan.parts[p].slice];
        const int64_t wanted = n_threads > 1 ? kPiecesPerThread * n_threads : 1;
        const int64_t step = column_step(width, 1, wanted, element_bytes(call));
        for (int64_t column = 0; column < width; column += step)
            plan.expand.push_back({static_cast<int32_t>(p), static_cast<int32_t>(end), 0, 0, column,
                                   std::min(step, width - column)});
        p = end;
    }
}

// Whether no row stands in two segments, so that parts may run side by side.
bool rows_are_disjoint(const Call& call, Plan& plan) {
    ++plan.call;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        if (call.entries[s] < 0) continue;
        for (int32_t p = call.starts[s]; p < call.starts[s + 1]; ++p) {
            int64_t& seen = plan.row_seen[call.rows[p]];
            if (seen == plan.call) return false;
            seen = plan.call;
        }
    }
    return true;
}

// Address of some rank row of a part's page of A or Bᵀ.
const char* factor(const Call& call, const Part& part, const int64_t* pages, int64_t page,
                   int64_t elements) {
    const LoraTargetDescriptor& t = call.target;
    const int64_t at = call.entries[part.segment] * t.n_slices + part.slice;
    return static_cast<const char*>(t.storage) +
           (pages[at * t.max_pages + page] + elements) * element_bytes(call);
}

void run_shrink(const Call& call, const Plan& plan, float* h, const ShrinkPiece& piece,
                void (*kernel)(const ShrinkArgs&), Ahead& ahead) {
    const LoraTargetDescriptor& t = call.target;
    const Part& part = plan.parts[piece.part];
    const int64_t stride = h_stride(part.rank);
    kernel({call.x, call.x_stride, call.rows + call.starts[part.segment] + piece.first_row,
            piece.n_rows,
            factor(call, part, t.a_pages, piece.page, piece.first_rank * t.in_features),
            piece.n_ranks, t.in_features,
            h + part.h + piece.first_row * stride + piece.page * kPageRank + piece.first_rank,
            stride, &ahead});
}

void run_expand(const Call& call, const Plan& plan, const float* h, const ExpandPiece& piece,
                void (*kernel)(const ExpandArgs&), Ahead& ahead) {
    const LoraTargetDescriptor& t = call.target;
    for (int32_t p = piece.part; p < piece.last_part; ++p) {
        const Part& part = plan.parts[p];
        const bool is_whole = piece.n_rows == 0;
        const int64_t first_row = is_whole ? 0 : piece.first_row;
        const int64_t first_pair = call.starts[part.segment] + first_row;
        const int64_t at = call.entries[part.segment] * t.n_slices + part.slice;
        const int64_t stride = h_stride(part.rank);
        kernel({call.out + (plan.slice_starts[part.slice] + piece.first_column) * element_bytes(call),
                call.out_stride, call.rows + first_pair,
                call.weights ? call.weights + first_pair : nullptr,
                is_whole ? row_count(call, part.segment) : piece.n_rows,
                h + part.h + first_row * stride, stride, t.storage, t.b_pages + at * t.max_pages,
                part.rank, t.out_features[part.slice], piece.first_column, piece.n_columns,
                t.scale[at], t.bias[at], &ahead});
    }
}

// Walks the factor bytes of one thread's pieces, the shrinks and then the expands.
struct Walk : Ahead {
    const Call& call;
    const Plan& plan;
    size_t shrink, last_shrink, expand, last_expand;
    int32_t part = -1;  // of the expand piece
    int64_t rank = 0;   // next rank row of that part

    Walk(const Call& call, const Plan& plan, size_t shrink, size_t last_shrink, size_t expand,
         size_t last_expand)
        : Ahead{nullptr, nullptr, &Walk::next}, call(call), plan(plan), shrink(shrink),
          last_shrink(last_shrink), expand(expand), last_expand(last_expand) {
        next(*this);
    }

    static void next(Ahead& base) {
        Walk& walk = static_cast<Walk&>(base);
        if (walk.shrink < walk.last_shrink)
            walk.enter_shrink();
        else if (walk.expand < walk.last_expand)
            walk.enter_expand();
        else
            walk.at = nullptr;
    }

    void enter_shrink() {
        const ShrinkPiece& piece = plan.shrink[shrink++];
        const int64_t width = call.target.in_features;
        at = factor(call, plan.parts[piece.part], call.target.a_pages, piece.page,
                    piece.first_rank * width);
        end = at + piece.n_ranks * width * element_bytes(call);
    }

    void enter_expand() {
        const ExpandPiece& piece = plan.expand[expand];
        if (part < piece.part) part = piece.part;
        while (part < piece.last_part && rank >= plan.parts[part].rank) {
            ++part;
            rank = 0;
        }
        if (part == piece.last_part) {
            ++expand;
            part = -1;
            rank = 0;
            return next(*this);
        }
        const Part& current = plan.parts[part];
        const int64_t width = call.target.out_features[current.slice];
        const bool is_contiguous = piece.n_columns == width;
        const int64_t n_rows =
            is_contiguous ? std::min<int64_t>(kPageRank, current.rank - rank) : 1;
        at = factor(call, current, call.target.b_pages, rank / kPageRank,
                    rank % kPageRank * width + piece.first_column);
        end = at + n_rows * piece.n_columns * element_bytes(call);
        rank += n_rows;
    }
};

template <typename Run>
void work_through(Share* shares, int n_threads, int thread, const Run& run) {
    for (int i = 0; i < n_threads; ++i) {
        const bool is_own = i == 0;
        Share& share = shares[(thread + i) % n_threads];
        for (;;) {
            if (share.next.load(std::memory_order_relaxed) >= share.end) break;
            const size_t piece = share.next.fetch_add(1, std::memory_order_relaxed);
            if (piece >= share.end) break;
            run(piece, is_own);
        }
    }
}

void share_out(std::vector<Share>& shares, size_t n_pieces, int n_threads, size_t first) {
    for (int i = 0; i < n_threads; ++i) {
        shares[first + i].next = n_pieces * i / n_threads;
        shares[first + i].end = n_pieces * (i + 1) / n_threads;
    }
}

const LoraKernels& kernels() {
#if LORAPLEX_X86
    switch (current_isa()) {
        case kAvx512Bf16: return kLoraAvx512Bf16;
        case kAvx512: return kLoraAvx512;
        case kAvx2: return kLoraAvx2;
        default: break;
    }
#endif
    return kLoraPortable;
}

// 0, or the number of the check that failed (see `_ERRORS` in cpu/lora.py).
int check(const Call& call, int64_t n_rows) {
    for (int64_t s = 0; s < call.n_segments; ++s) {
        if (call.entries[s] >= call.target.n_entries) return 1;
        if (call.entries[s] < 0) continue;
        int32_t last = -1;
        for (int32_t p = call.starts[s]; p < call.starts[s + 1]; ++p) {
            if (call.rows[p] < 0 || call.rows[p] >= n_rows) return 2;
            if (call.rows[p] <= last) return 3;
            last = call.rows[p];
        }
    }
    return 0;
}

void run(const Call& call, Plan& plan, int64_t n_rows) {
    const LoraTargetDescriptor& t = call.target;
    const int64_t h_size = list_parts(call, plan);
    if (plan.parts.empty()) return;
    if (plan.h.size() < static_cast<size_t>(h_size)) plan.h.resize(h_size);
    if (plan.row_seen.size() < static_cast<size_t>(n_rows)) plan.row_seen.resize(n_rows, 0);
    plan.slice_starts.assign(t.n_slices, 0);
    for (int64_t i = 1; i < t.n_slices; ++i)
        plan.slice_starts[i] = plan.slice_starts[i - 1] + t.out_features[i - 1];
    const int n_threads = plan.work < kSerialWork ? 1 : omp_get_max_threads();
    plan.expand.clear();
    if (rows_are_disjoint(call, plan))
        cut_expand_by_part(call, plan, n_threads);
    else
        cut_expand_by_column(call, plan, n_threads);
    cut_shrink(call, plan, n_threads);

    const LoraKernels& table = kernels();
    const auto shrink = table.shrink[t.dtype];
    const auto expand = table.expand[t.dtype];
    float* h = plan.h.data();
    if (plan.shares.size() < 2u * n_threads) plan.shares = std::vector<Share>(2 * n_threads);
    share_out(plan.shares, plan.shrink.size(), n_threads, 0);
    share_out(plan.shares, plan.expand.size(), n_threads, n_threads);
    Share* shares = plan.shares.data();
    const Plan& done = plan;
    const int n_shares = n_threads;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
        const int thread = omp_get_thread_num();
        const Share &own = shares[thread], &own_expand = shares[n_shares + thread];
        Ahead idle{nullptr, nullptr, nullptr};
        Walk walk(call, done, own.next, own.end, own_expand.next, own_expand.end);
        table.warm_up(walk, kAheadBytes);
        work_through(shares, n_shares, thread, [&](size_t i, bool is_own) {
            run_shrink(call, done, h, done.shrink[i], shrink, is_own ? walk : idle);
        });
#pragma omp barrier
        work_through(shares + n_shares, n_shares, thread, [&](size_t i, bool is_own) {
            run_expand(call, done, h, done.expand[i], expand, is_own ? walk : idle);
        });
    }
}

}  // namespace
}  // namespace loraplex

// Adds to `out` in place. Strides count elements. Returns 0, or which check failed.
LORAPLEX_API int loraplex_lora_apply(const loraplex::LoraTargetDescriptor* target, const void* x,
                                     int64_t x_stride, void* out, int64_t out_stride,
                                     int64_t n_rows, const int32_t* entries, const int32_t* starts,
                                     const int32_t* rows, const float* weights,
                                     int64_t n_segments) {
    thread_local loraplex::Plan plan;  // grows to the largest call of this thread
    const loraplex::Call call{*target, x, x_stride, static_cast<char*>(out), out_stride,
                              entries, starts, rows, weights, n_segments};
    if (const int failed = loraplex::check(call, n_rows)) return failed;
    loraplex::run(call, plan, n_rows);
    return 0;
}
