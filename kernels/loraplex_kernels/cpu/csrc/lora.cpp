// Cuts one LoRA call into pieces of work and runs them on torch's threads, alone or after the base's
// product.

#include "lora.h"

#include "model_ops.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
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
constexpr int64_t kRankStep = kBlockRows;   // smallest cut of a page
constexpr int64_t kColumnStep = 64;         // smallest cut of a slice; a cache line never has two owners
constexpr int64_t kPieceBytes = 64 << 10;   // of factors, at most
constexpr int64_t kPiecesPerThread = 6;     // enough that one slow thread delays nobody long
constexpr int64_t kSerialWork = 64 << 10;   // multiply-adds below which threads cost more than they bring
constexpr int64_t kUnitsPerThread = 2;      // so many of the largest, at least, to divide work by units
constexpr int64_t kLargeFetch = 256 << 10;  // bytes of a call; below, fetching hardly matters
constexpr double kHeavyFetch = 0.4;         // of the base's bytes: more is on trial for itself
constexpr int64_t kManyRows = 64;           // whose product leaves the memory idle: fetching always pays
constexpr int64_t kWantedUnits = 2;         // of a thread, where segments have many rows

struct Call {
    const LoraTargetDescriptor& target;
    const void* x;
    int64_t x_stride;
    char* out;
    int64_t out_stride;
    const int32_t* slots;
    const int32_t* indptr;
    const int32_t* indices;  // into out
    const float* weights;
    int64_t n_segments, n_indices;
    const int32_t* x_rows;  // into x; the same as `indices`, but for pairs that share a row of x

    Call(const LoraTargetDescriptor& target, const void* x, int64_t x_stride, void* out,
         int64_t out_stride, const LoraSegments& s)
        : target(target), x(x), x_stride(x_stride), out(static_cast<char*>(out)),
          out_stride(out_stride), slots(s.slots), indptr(s.indptr), indices(s.indices),
          weights(s.weights), n_segments(s.n_segments), n_indices(s.n_indices), x_rows(s.indices) {}
};

// The work of one segment on one slice.
struct Part {
    int64_t segment, slice, rank, h;  // h: offset of [n_rows, stride] among the intermediates
};

// Of the low-rank intermediate. A part's own, so that no two threads write to one cache line.
struct alignas(64) Line {
    float values[16];
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

// Some rows of one segment, on all slices.
struct Unit {
    int32_t part, last_part;
    int64_t first_row, n_rows;
    int64_t cost;
};

enum class Cut { kNothing, kUnits, kPieces };

// Fetching much pays on a machine whose memory has time to spare while the base's product runs, and
// costs on one where it has not. So a thread's first large calls are made in pairs of one shape and
// load, one that fetches and one that does not, and the later calls go with the faster. Chance says
// which comes first, as any turns may fall in step with the layers. No result depends on it.
class FetchTrial {
public:
    struct Load {
        int64_t in_features, n_columns, n_rows, n_fetched;

        bool is_like(const Load& other) const {
            return n_rows == other.n_rows && 8 * std::abs(n_fetched - other.n_fetched) <= n_fetched;
        }
    };

    bool is_over() const { return ratios_.size() >= kPairs; }
    // Whether the next call of this load fetches.
    bool fetches(const Load& load) {
        if (is_over()) return fetching_is_faster_;
        const Half& first = half(load);
        return first.seconds > 0 ? !first.fetched : (coin_ >> 31) != 0;
    }
    void add(const Load& load, bool fetched, double seconds) {
        Half& first = half(load);
        if (first.seconds == 0) {
            first.fetched = fetched;
            first.seconds = seconds;
            coin_ = coin_ * 1664525u + 1013904223u;
            return;
        }
        ratios_.push_back(fetched ? seconds / first.seconds : first.seconds / seconds);
        first.seconds = 0;
        if (!is_over()) return;
        std::nth_element(ratios_.begin(), ratios_.begin() + kPairs / 2, ratios_.end());
        fetching_is_faster_ = ratios_[kPairs / 2] < 1;
    }

private:
    static constexpr size_t kPairs = 600;  // ten steps of a small model
    struct Half {  // of a pair; of no pair where its time is zero
        Load load;
        bool fetched;
        double seconds;
    };
    // Of this shape; a new one if the last was of another load.
    Half& half(const Load& load) {
        for (Half& known : halves_) {
            if (known.load.in_features != load.in_features || known.load.n_columns != load.n_columns)
                continue;
            if (!known.load.is_like(load)) known = {load, false, 0};
            return known;
        }
        halves_.push_back({load, false, 0});
        return halves_.back();
    }
    uint32_t coin_ = 1;
    bool fetching_is_faster_ = true;
    std::vector<Half> halves_;
    std::vector<double> ratios_;  // with, by without
};

struct Plan {
    Cut cut = Cut::kNothing;
    int n_threads = 1;
    bool in_cache = false;  // whether the factors were fetched before
    std::vector<Unit> units, dealt;  // by cost; by thread
    std::vector<FetchRun> runs;  // what the units read, thread after thread
    std::vector<size_t> run_starts;  // of each thread, and the end
    std::vector<FetchList> fetch;
    FetchTrial light_trial, heavy_trial;  // by what is fetched, beside the base's weights
    std::vector<Part> parts;
    std::vector<ShrinkPiece> shrink;
    std::vector<ExpandPiece> expand;
    std::vector<Line> h;
    std::vector<int64_t> slice_starts;
    std::vector<Share> shares;  // of the units or shrink pieces, then of the units again or the expand pieces
    std::vector<int64_t> row_seen;  // the call that saw the row last
    std::vector<int32_t> x_rows;
    std::vector<char> pairs;  // rows of out, one for each pair
    int64_t call = 0;
    int64_t work = 0;  // multiply-adds
};

float* intermediates(Plan& plan) { return reinterpret_cast<float*>(plan.h.data()); }
int64_t element_bytes(const Call& call) { return call.target.dtype == kBFloat16 ? 2 : 4; }
int64_t h_stride(int64_t rank) { return (rank + 15) / 16 * 16; }  // whole lines
int64_t row_count(const Call& call, int64_t s) { return call.indptr[s + 1] - call.indptr[s]; }

int64_t n_columns(const LoraTargetDescriptor& t) {
    int64_t n = 0;
    for (int64_t i = 0; i < t.n_slices; ++i) n += t.out_features[i];
    return n;
}

bool has_work(const LoraTargetDescriptor& t, int64_t at) {
    return t.ranks[at] > 0 || t.scale[at] != kNoPage || t.bias[at] != kNoPage;
}

void prefetch_range(const void* first, int64_t n_bytes) {
    const char* p = static_cast<const char*>(first);
    for (int64_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(p + i);
    __builtin_prefetch(p + n_bytes - 1);
}

// The tables are cold at every call, and their reads would wait one for another.
void prefetch_tables(const Call& call) {
    const LoraTargetDescriptor& t = call.target;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        if (call.slots[s] < 0) continue;
        const int64_t at = call.slots[s] * t.n_slices;
        prefetch_range(t.ranks + at, t.n_slices * 4);
        prefetch_range(t.scale + at, t.n_slices * 8);
        prefetch_range(t.bias + at, t.n_slices * 8);
        prefetch_range(t.a_pages + at * t.max_pages, t.n_slices * t.max_pages * 8);
        prefetch_range(t.b_pages + at * t.max_pages, t.n_slices * t.max_pages * 8);
    }
}

// Parts ordered by segment, then slice. Returns the number of intermediates, whole lines.
int64_t list_parts(const Call& call, Plan& plan) {
    const LoraTargetDescriptor& t = call.target;
    plan.parts.clear();
    plan.work = 0;
    int64_t h = 0;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        const int64_t n_rows = row_count(call, s);
        if (call.slots[s] < 0 || n_rows == 0) continue;
        for (int64_t i = 0; i < t.n_slices; ++i) {
            const int64_t at = call.slots[s] * t.n_slices + i;
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
    const int64_t even = std::min((width + wanted - 1) / wanted, kStreamColumns);
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
        if (call.slots[s] < 0) continue;
        for (int32_t p = call.indptr[s]; p < call.indptr[s + 1]; ++p) {
            int64_t& seen = plan.row_seen[call.indices[p]];
            if (seen == plan.call) return false;
            seen = plan.call;
        }
    }
    return true;
}

// Some rank rows of a page of A or Bᵀ; of compact ones `first_rank` begins a block.
struct RankRows {
    const char* first;
    bool compact;
    int64_t row_bytes;
};

RankRows rank_rows(const Call& call, const Part& part, const int64_t* pages, int64_t page,
                   int64_t first_rank, int64_t width) {
    const LoraTargetDescriptor& t = call.target;
    const int64_t at = call.slots[part.segment] * t.n_slices + part.slice;
    const int64_t offset = pages[at * t.max_pages + page];
    const bool compact = offset & kCompact;
    const int64_t row_bytes = compact ? compact_row_bytes(width) : width * element_bytes(call);
    return {static_cast<const char*>(t.storage) + (offset & ~kCompact) * element_bytes(call) +
                first_rank * row_bytes,
            compact, row_bytes};
}

// For opened compact rows.
void* scratch(int64_t n_bytes) {
    thread_local std::vector<char> bytes;  // grows to the largest call of this thread
    if (static_cast<int64_t>(bytes.size()) < n_bytes) bytes.resize(n_bytes);
    return bytes.data();
}

void run_shrink(const Call& call, const Plan& plan, float* h, const ShrinkPiece& piece,
                void (*kernel)(const ShrinkArgs&)) {
    const LoraTargetDescriptor& t = call.target;
    const Part& part = plan.parts[piece.part];
    const int64_t stride = h_stride(part.rank);
    const RankRows a = rank_rows(call, part, t.a_pages, piece.page, piece.first_rank, t.in_features);
    kernel({call.x, call.x_stride, call.x_rows + call.indptr[part.segment] + piece.first_row,
            piece.n_rows, a.first, a.compact,
            a.compact ? scratch(piece.n_ranks * t.in_features * element_bytes(call)) : nullptr,
            piece.n_ranks, t.in_features,
            h + part.h + piece.first_row * stride + piece.page * kPageRank + piece.first_rank,
            stride});
}

void run_expand(const Call& call, const Plan& plan, const float* h, const ExpandPiece& piece,
                void (*kernel)(const ExpandArgs&)) {
    const LoraTargetDescriptor& t = call.target;
    for (int32_t p = piece.part; p < piece.last_part; ++p) {
        const Part& part = plan.parts[p];
        const bool is_whole = piece.n_rows == 0;
        const int64_t first_row = is_whole ? 0 : piece.first_row;
        const int64_t first_pair = call.indptr[part.segment] + first_row;
        const int64_t at = call.slots[part.segment] * t.n_slices + part.slice;
        const int64_t stride = h_stride(part.rank);
        kernel({call.out + (plan.slice_starts[part.slice] + piece.first_column) * element_bytes(call),
                call.out_stride, call.indices + first_pair,
                call.weights ? call.weights + first_pair : nullptr,
                is_whole ? row_count(call, part.segment) : piece.n_rows,
                h + part.h + first_row * stride, stride, t.storage, t.b_pages + at * t.max_pages,
                part.rank, t.out_features[part.slice], piece.first_column, piece.n_columns,
                t.scale[at], t.bias[at], plan.in_cache,
                scratch(part.rank * piece.n_columns * element_bytes(call))});
    }
}

template <typename Run>
void work_through(Share* shares, int n_threads, int thread, const Run& run) {
    for (int i = 0; i < n_threads; ++i) {
        Share& share = shares[(thread + i) % n_threads];
        for (;;) {
            if (share.next.load(std::memory_order_relaxed) >= share.end) break;
            const size_t piece = share.next.fetch_add(1, std::memory_order_relaxed);
            if (piece >= share.end) break;
            run(piece);
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

// 0, or the number of the check that failed (see `SEGMENT_ERRORS` in cpu/lora.py).
int check(const Call& call, int64_t n_rows) {
    if (call.indptr[0] < 0) return 6;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        if (call.slots[s] >= call.target.n_slots) return 1;
        if (call.indptr[s + 1] < call.indptr[s] || call.indptr[s + 1] > call.n_indices) return 6;
        if (call.slots[s] < 0) continue;
        int32_t last = -1;
        for (int32_t p = call.indptr[s]; p < call.indptr[s + 1]; ++p) {
            if (call.indices[p] < 0 || call.indices[p] >= n_rows) return 2;
            if (call.indices[p] <= last) return 3;
            last = call.indices[p];
        }
    }
    return 0;
}

// One thread takes some rows of a segment through both products, and reads its factors in the order
// in which they lie, A then Bᵀ of every slice. Units are dealt to the threads' shares like cards,
// the costly ones first. False if too few or too unequal units come of it.
bool cut_into_units(const Call& call, Plan& plan, int n_threads) {
    const LoraTargetDescriptor& t = call.target;
    plan.units.clear();
    int64_t total = 0;
    for (size_t p = 0; p < plan.parts.size();) {  // one unit a segment
        size_t end = p;
        int64_t cost = 0;  // of a tile's rows
        for (; end < plan.parts.size() && plan.parts[end].segment == plan.parts[p].segment; ++end)
            cost += (plan.parts[end].rank + 1) * (t.in_features + t.out_features[plan.parts[end].slice]);
        const int64_t n_rows = row_count(call, plan.parts[p].segment);
        plan.units.push_back({static_cast<int32_t>(p), static_cast<int32_t>(end), 0, n_rows, cost});
        total += cost * ((n_rows + kTileRows - 1) / kTileRows);
        p = end;
    }
    int64_t largest = 0;
    for (size_t i = 0, n_segments = plan.units.size(); i < n_segments; ++i) {
        const Unit segment = plan.units[i];
        const int64_t fair = total / (segment.cost * kWantedUnits * n_threads);  // tiles
        const int64_t tiles = std::max<int64_t>(1, std::min(fair, kRowBlock / kTileRows));
        for (int64_t row = 0; row < segment.n_rows; row += tiles * kTileRows) {
            Unit unit = segment;
            unit.first_row = row;
            unit.n_rows = std::min(tiles * kTileRows, segment.n_rows - row);
            unit.cost = segment.cost * ((unit.n_rows + kTileRows - 1) / kTileRows);
            largest = std::max(largest, unit.cost);
            if (row == 0)
                plan.units[i] = unit;
            else
                plan.units.push_back(unit);
        }
    }
    if (largest * n_threads * kUnitsPerThread > total) return false;
    const auto costs_more = [](const Unit& a, const Unit& b) { return a.cost > b.cost; };
    if (!std::is_sorted(plan.units.begin(), plan.units.end(), costs_more))
        std::stable_sort(plan.units.begin(), plan.units.end(), costs_more);
    plan.dealt.clear();
    for (int thread = 0; thread < n_threads; ++thread) {
        const size_t first = plan.dealt.size();
        for (size_t i = thread; i < plan.units.size(); i += n_threads)
            plan.dealt.push_back(plan.units[i]);
        for (Share* share : {&plan.shares[thread], &plan.shares[n_threads + thread]}) {
            share->next = first;
            share->end = plan.dealt.size();
        }
    }
    return true;
}

void shrink_unit(const Call& call, const Plan& plan, float* h, const Unit& unit,
                 void (*kernel)(const ShrinkArgs&)) {
    for (int32_t p = unit.part; p < unit.last_part; ++p)
        for (int64_t first = 0, rank = plan.parts[p].rank; first < rank; first += kPageRank)
            run_shrink(call, plan, h,
                       {p, static_cast<int32_t>(first / kPageRank), unit.first_row, unit.n_rows, 0,
                        static_cast<int32_t>(std::min<int64_t>(kPageRank, rank - first))},
                       kernel);
}

void expand_unit(const Call& call, const Plan& plan, const float* h, const Unit& unit,
                 void (*kernel)(const ExpandArgs&)) {
    for (int32_t p = unit.part; p < unit.last_part; ++p) {
        const int64_t width = call.target.out_features[plan.parts[p].slice];
        for (int64_t column = 0; column < width; column += kStreamColumns)
            run_expand(call, plan, h,
                       {p, p + 1, unit.first_row, unit.n_rows, column,
                        std::min(kStreamColumns, width - column)},
                       kernel);
    }
}

void run_by_unit(const Call& call, Plan& plan) {
    const auto shrink = kernels().shrink[call.target.dtype];
    const auto expand = kernels().expand[call.target.dtype];
    const int n_threads = plan.n_threads;
    const Plan& done = plan;
    Share* shares = plan.shares.data();
    float* h = intermediates(plan);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    work_through(shares, n_threads, omp_get_thread_num(), [&](size_t i) {
        shrink_unit(call, done, h, done.dealt[i], shrink);
        expand_unit(call, done, h, done.dealt[i], expand);
    });
}

void run_by_piece(const Call& call, Plan& plan) {
    const auto shrink = kernels().shrink[call.target.dtype];
    const auto expand = kernels().expand[call.target.dtype];
    const int n_threads = plan.n_threads;
    const Plan& done = plan;
    Share* shares = plan.shares.data();
    float* h = intermediates(plan);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
        const int thread = omp_get_thread_num();
        work_through(shares, n_threads, thread,
                     [&](size_t i) { run_shrink(call, done, h, done.shrink[i], shrink); });
#pragma omp barrier
        work_through(shares + n_threads, n_threads, thread,
                     [&](size_t i) { run_expand(call, done, h, done.expand[i], expand); });
    }
}

// Decides who does what. Reads tables and indices, no factor and no x.
void prepare(const Call& call, Plan& plan, int64_t n_rows) {
    const LoraTargetDescriptor& t = call.target;
    plan.cut = Cut::kNothing;
    plan.in_cache = false;
    prefetch_tables(call);
    const int64_t h_size = list_parts(call, plan);
    if (plan.parts.empty()) return;
    if (plan.h.size() * 16 < static_cast<size_t>(h_size)) plan.h.resize(h_size / 16);
    if (plan.row_seen.size() < static_cast<size_t>(n_rows)) plan.row_seen.resize(n_rows, 0);
    plan.slice_starts.assign(t.n_slices, 0);
    for (int64_t i = 1; i < t.n_slices; ++i)
        plan.slice_starts[i] = plan.slice_starts[i - 1] + t.out_features[i - 1];
    const int n_threads = plan.work < kSerialWork ? 1 : omp_get_max_threads();
    plan.n_threads = n_threads;
    if (plan.shares.size() < 2u * n_threads) plan.shares = std::vector<Share>(2 * n_threads);
    plan.expand.clear();
    if (!rows_are_disjoint(call, plan)) {
        cut_expand_by_column(call, plan, n_threads);
    } else if (cut_into_units(call, plan, n_threads)) {
        plan.cut = Cut::kUnits;
        return;
    } else {
        cut_expand_by_part(call, plan, n_threads);
    }
    cut_shrink(call, plan, n_threads);
    plan.cut = Cut::kPieces;
    share_out(plan.shares, plan.shrink.size(), n_threads, 0);
    share_out(plan.shares, plan.expand.size(), n_threads, n_threads);
}

void run(const Call& call, Plan& plan) {
    if (plan.cut == Cut::kUnits) run_by_unit(call, plan);
    if (plan.cut == Cut::kPieces) run_by_piece(call, plan);
}

// Rows of one page of A or Bᵀ; one run with the page before it where they touch, as they do in an
// entry that lies in one stretch.
void add_run(std::vector<FetchRun>& runs, size_t first_own, const char* page, int64_t n_bytes) {
    const long n_lines = (n_bytes + kLineBytes - 1) / kLineBytes;
    if (runs.size() > first_own) {
        FetchRun& last = runs.back();
        if (last.first + last.n_lines * kLineBytes == page) {
            last.n_lines += n_lines;
            return;
        }
    }
    runs.push_back({page, n_lines});
}

// What each thread will read of the units that it begins with, in that order. Null where pieces of
// one factor go to all threads.
const FetchList* list_fetches(const Call& call, Plan& plan) {
    if (plan.cut != Cut::kUnits) return nullptr;
    const LoraTargetDescriptor& t = call.target;
    plan.runs.clear();
    std::vector<size_t>& starts = plan.run_starts;
    starts.clear();
    for (int thread = 0; thread < plan.n_threads; ++thread) {
        starts.push_back(plan.runs.size());
        const Share& share = plan.shares[thread];
        for (size_t i = share.next; i < share.end; ++i) {
            const Unit& unit = plan.dealt[i];
            if (unit.first_row > 0) continue;  // its segment's first unit fetches for all
            for (const int64_t* pages : {t.a_pages, t.b_pages})
                for (int32_t p = unit.part; p < unit.last_part; ++p) {
                    const Part& part = plan.parts[p];
                    const int64_t width = pages == t.a_pages ? t.in_features : t.out_features[part.slice];
                    for (int64_t first = 0; first < part.rank; first += kPageRank) {
                        const RankRows rows =
                            rank_rows(call, part, pages, first / kPageRank, 0, width);
                        add_run(plan.runs, starts.back(), rows.first,
                                std::min<int64_t>(kPageRank, part.rank - first) * rows.row_bytes);
                    }
                }
        }
    }
    starts.push_back(plan.runs.size());
    plan.fetch.assign(omp_get_max_threads(), {nullptr, 0});
    for (int thread = 0; thread < plan.n_threads; ++thread)
        plan.fetch[thread] = {plan.runs.data() + starts[thread],
                              static_cast<long>(starts[thread + 1] - starts[thread])};
    return plan.fetch.data();
}

Plan& own_plan() {
    thread_local Plan plan;  // grows to the largest call of this thread
    return plan;
}

// The base's product of some rows, while the factors of `call` are fetched.
struct Base {
    const void* packed;
    const float* bias;
    const void* x;
    int64_t x_stride;
    void* out;
    int64_t out_stride;
    int64_t n_rows;
};

LinearArgs product_of(const Base& base, const LoraTargetDescriptor& t, const FetchList* const* fetch) {
    return {base.x, base.packed, base.bias, base.out, base.x_stride,
            base.out_stride, base.n_rows, n_columns(t), t.in_features, fetch};
}

void run_base(const Base& base, const Call& call, const FetchList* fetch) {
    model_ops().linear[call.target.dtype](product_of(base, call.target, fetch ? &fetch : nullptr));
}

int64_t n_fetch_bytes(const Plan& plan) {
    int64_t n_lines = 0;
    for (const FetchRun& run : plan.runs) n_lines += run.n_lines;
    return n_lines * kLineBytes;
}

// Chooses whether the base's product fetches for a call, and tells the trial how long the two took.
class FetchChoice {
public:
    FetchChoice(const Base& base, const Call& call, Plan& plan) : base_(base), call_(call), plan_(plan) {}

    // What to fetch, or null. Once, behind `prepare`.
    const FetchList* choose() {
        const FetchList* fetch = list_fetches(call_, plan_);
        const int64_t n_fetched = fetch ? n_fetch_bytes(plan_) : 0;
        if (n_fetched > kLargeFetch && base_.n_rows < kManyRows) {
            const LoraTargetDescriptor& t = call_.target;
            const int64_t n_weights = t.in_features * n_columns(t) * element_bytes(call_);
            trial_ = n_fetched > kHeavyFetch * n_weights ? &plan_.heavy_trial : &plan_.light_trial;
            load_ = {t.in_features, n_columns(t), base_.n_rows, n_fetched};
            if (!trial_->fetches(load_)) fetch = nullptr;
        }
        plan_.in_cache = fetch != nullptr;
        return fetch;
    }
    void done() {
        if (!trial_ || trial_->is_over()) return;
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start_;
        trial_->add(load_, plan_.in_cache, took.count());
    }

private:
    const Base& base_;
    const Call& call_;
    Plan& plan_;
    FetchTrial* trial_ = nullptr;  // null: nothing to try
    FetchTrial::Load load_{};
    const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// The base's product, then `finish`. The threads that compute the product fetch for the call meanwhile, whose
// rows of out are `n_rows`.
template <typename Finish>
void run_over(const Base& base, const Call& call, Plan& plan, int64_t n_rows, const Finish& finish) {
    FetchChoice choice(base, call, plan);
    prepare(call, plan, n_rows);
    run_base(base, call, choice.choose());
    finish();
    choice.done();
}

// The base's product and the call's on top, by one team of threads. One of them plans the second while the
// others begin with the first. Shrinking does not read what the product makes, so a thread that has no
// panel left begins with it instead of waiting for the others.
void run_together(const Base& base, const Call& call, Plan& plan) {
    const LoraTargetDescriptor& t = call.target;
    const auto shrink = kernels().shrink[t.dtype];
    const auto expand = kernels().expand[t.dtype];
    const auto part = model_ops().linear_part[t.dtype];
    const int n_threads = omp_get_max_threads();
    FetchChoice choice(base, call, plan);
    const FetchList* fetch = nullptr;
    const LinearArgs product = product_of(base, t, &fetch);
    long taken = 0;
    bool is_planned = false, by_unit = false;
#pragma omp parallel num_threads(n_threads)
    {
        const int thread = omp_get_thread_num();
        if (thread == 0) {
            prepare(call, plan, base.n_rows);
            by_unit = plan.cut == Cut::kUnits && plan.n_threads == n_threads;
            __atomic_store_n(&fetch, choice.choose(), __ATOMIC_RELEASE);
            __atomic_store_n(&is_planned, true, __ATOMIC_RELEASE);
        }
        part(product, n_threads, &taken);
        while (!__atomic_load_n(&is_planned, __ATOMIC_ACQUIRE)) {  // it has been, but for tiny products
        }
        if (by_unit) {
            const Plan& done = plan;
            Share* shares = plan.shares.data();
            float* h = intermediates(plan);
            work_through(shares, n_threads, thread,
                         [&](size_t i) { shrink_unit(call, done, h, done.dealt[i], shrink); });
#pragma omp barrier
            work_through(shares + n_threads, n_threads, thread,
                         [&](size_t i) { expand_unit(call, done, h, done.dealt[i], expand); });
        }
    }
    if (!by_unit) run(call, plan);
    choice.done();
}

template <typename Row>
bool rows_are_in(const Row* rows, int64_t n, int64_t n_rows) {
    for (int64_t i = 0; i < n; ++i)
        if (rows[i] < 0 || rows[i] >= n_rows) return false;
    return true;
}

// The pairs of a gate and up product: act[p] = silu(gate) ⊙ up of the base's row of p with the
// segments' products on top.
struct Gated {
    const Call& call;  // its `out` holds the pairs where they are cut into pieces
    const char* base;
    int64_t base_stride;  // bytes
    char* act;
    int64_t act_stride;  // bytes

    int64_t row_bytes() const { return n_columns(call.target) * element_bytes(call); }
    const char* base_row(int64_t position) const {  // of a place in `call.indices`
        return base + call.x_rows[position] * base_stride;
    }
    void finish(const char* gate_up, int64_t position) const {
        model_ops().gate_row[call.target.dtype](
            {gate_up, act + call.indices[position] * act_stride, 1, call.target.out_features[0], 0});
    }
};

// Some pairs at a time, whose rows never leave the first caches of the thread.
void run_gated_unit(const Gated& gated, const Plan& plan, float* h, const Unit& unit, char* tile) {
    static const int32_t kTile[kTileRows] = {0, 1, 2, 3};
    const Call& call = gated.call;
    const LoraTargetDescriptor& t = call.target;
    const int64_t row_bytes = gated.row_bytes(), segment = plan.parts[unit.part].segment;
    const auto shrink = kernels().shrink[t.dtype];
    const auto expand = kernels().expand[t.dtype];
    for (int64_t row = unit.first_row; row < unit.first_row + unit.n_rows; row += kTileRows) {
        const int64_t n_rows = std::min(kTileRows, unit.first_row + unit.n_rows - row);
        const int64_t position = call.indptr[segment] + row;
        for (int64_t i = 0; i < n_rows; ++i)
            memcpy(tile + i * row_bytes, gated.base_row(position + i), row_bytes);
        for (int32_t p = unit.part; p < unit.last_part; ++p) {
            const Part& part = plan.parts[p];
            for (int64_t first = 0; first < part.rank; first += kPageRank)
                run_shrink(call, plan, h,
                           {p, static_cast<int32_t>(first / kPageRank), row, n_rows, 0,
                            static_cast<int32_t>(std::min<int64_t>(kPageRank, part.rank - first))},
                           shrink);
            const int64_t at = call.slots[segment] * t.n_slices + part.slice;
            const int64_t width = t.out_features[part.slice], stride = h_stride(part.rank);
            for (int64_t column = 0; column < width; column += kStreamColumns) {
                const int64_t n = std::min(kStreamColumns, width - column);
                expand({tile + (plan.slice_starts[part.slice] + column) * element_bytes(call),
                        n_columns(t), kTile, nullptr, n_rows, h + part.h + row * stride, stride,
                        t.storage, t.b_pages + at * t.max_pages, part.rank, width, column, n,
                        t.scale[at], t.bias[at], plan.in_cache,
                        scratch(part.rank * n * element_bytes(call))});
            }
        }
        for (int64_t i = 0; i < n_rows; ++i) gated.finish(tile + i * row_bytes, position + i);
    }
}

// Pairs of segments that change nothing.
void run_gated_rest(const Gated& gated) {
    const Call& call = gated.call;
    for (int64_t s = 0; s < call.n_segments; ++s) {
        bool changes = false;
        for (int64_t i = 0; call.slots[s] >= 0 && i < call.target.n_slices; ++i)
            changes |= has_work(call.target, call.slots[s] * call.target.n_slices + i);
        for (int64_t p = call.indptr[s]; !changes && p < call.indptr[s + 1]; ++p)
            gated.finish(gated.base_row(p), p);
    }
}

void run_gated(const Gated& gated, Plan& plan, int64_t n_pairs) {
    const Call& call = gated.call;
    const int64_t row_bytes = gated.row_bytes();
    if (plan.cut != Cut::kPieces) {
        run_gated_rest(gated);
        if (plan.cut == Cut::kNothing) return;
        const int n_threads = plan.n_threads;
        const Plan& done = plan;
        Share* shares = plan.shares.data();
        float* h = intermediates(plan);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
        {
            thread_local std::vector<char> tile;
            if (static_cast<int64_t>(tile.size()) < kTileRows * row_bytes)
                tile.resize(kTileRows * row_bytes);
            work_through(shares, n_threads, omp_get_thread_num(), [&](size_t i) {
                run_gated_unit(gated, done, h, done.dealt[i], tile.data());
            });
        }
        return;
    }
    const int n_threads = plan.n_threads;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int64_t p = 0; p < n_pairs; ++p)
        memcpy(call.out + call.indices[p] * row_bytes, gated.base_row(p), row_bytes);
    run_by_piece(call, plan);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (int64_t p = 0; p < n_pairs; ++p) gated.finish(call.out + call.indices[p] * row_bytes, p);
}

// out[pair_rows[p]] += delta[p], over the neighbouring pairs of a row at once.
void add_pairs(const Call& call, const int64_t* pair_rows, int64_t n_pairs, char* out,
               int64_t out_stride) {
    const auto sum = kernels().sum[call.target.dtype];
    const int64_t bytes = element_bytes(call), width = n_columns(call.target);
#pragma omp parallel for schedule(static) if (n_pairs * width > kSerialWork)
    for (int64_t p = 0; p < n_pairs; ++p) {
        if (p > 0 && pair_rows[p] == pair_rows[p - 1]) continue;
        int64_t end = p + 1;
        while (end < n_pairs && pair_rows[end] == pair_rows[p]) ++end;
        sum({out + pair_rows[p] * out_stride * bytes, call.out + p * width * bytes, end - p, width});
    }
}

}  // namespace
}  // namespace loraplex

// Adds to `out` in place. Strides count elements. Returns 0, or which check failed.
LORAPLEX_API int loraplex_lora_apply(const loraplex::LoraTargetDescriptor* target, const void* x,
                                     int64_t x_stride, void* out, int64_t out_stride,
                                     int64_t n_rows, const loraplex::LoraSegments* segments) {
    loraplex::Plan& plan = loraplex::own_plan();
    const loraplex::Call call(*target, x, x_stride, out, out_stride, *segments);
    if (const int failed = loraplex::check(call, n_rows)) return failed;
    loraplex::prepare(call, plan, n_rows);
    loraplex::run(call, plan);
    return 0;
}

// The base's product into `out`, then the same on top: while the first computes, it fetches the
// factors of the second. `packed` and `bias` as in `loraplex_linear`, of the target's dtype.
LORAPLEX_API int loraplex_adapted_linear(const loraplex::LoraTargetDescriptor* target,
                                         const void* packed, const float* bias, const void* x,
                                         int64_t x_stride, void* out, int64_t out_stride,
                                         int64_t n_rows, const loraplex::LoraSegments* segments) {
    loraplex::Plan& plan = loraplex::own_plan();
    const loraplex::Call call(*target, x, x_stride, out, out_stride, *segments);
    if (const int failed = loraplex::check(call, n_rows)) return failed;
    const loraplex::Base base{packed, bias, x, x_stride, out, out_stride, n_rows};
    if (omp_get_max_threads() > 1 &&
        loraplex::is_for_many_threads(n_rows, loraplex::n_columns(*target), target->in_features))
        loraplex::run_together(base, call, plan);
    else
        loraplex::run_over(base, call, plan, n_rows, [&] { loraplex::run(call, plan); });
    return 0;
}

// The base's gate and up products into `out`, and for every pair silu(gate) ⊙ up of its row of them
// with the segments' product of its row of x on top, without weights. Segments hold every pair once.
LORAPLEX_API int loraplex_spread_linear(const loraplex::LoraTargetDescriptor* target,
                                        const void* packed, const float* bias, const void* x,
                                        int64_t x_stride, void* out, int64_t out_stride,
                                        int64_t n_rows, const loraplex::LoraSegments* segments, const int64_t* pair_rows,
                                        int64_t n_pairs, void* act, int64_t act_stride) {
    loraplex::Plan& plan = loraplex::own_plan();
    const int64_t width = loraplex::n_columns(*target);
    const int64_t bytes = target->dtype == loraplex::kBFloat16 ? 2 : 4;
    plan.x_rows.resize(n_pairs);
    plan.pairs.resize(n_pairs * width * bytes);
    loraplex::Call call(*target, x, x_stride, plan.pairs.data(), width, *segments);
    call.weights = nullptr;
    call.x_rows = plan.x_rows.data();
    if (!loraplex::rows_are_in(pair_rows, n_pairs, n_rows)) return 4;
    if (const int failed = loraplex::check(call, n_pairs)) return failed;
    if (call.indptr[0] != 0 || call.indptr[call.n_segments] != n_pairs ||
        !loraplex::rows_are_in(call.indices, n_pairs, n_pairs))
        return 5;
    for (int64_t i = 0; i < n_pairs; ++i)
        plan.x_rows[i] = static_cast<int32_t>(pair_rows[call.indices[i]]);
    const loraplex::Gated gated{call, static_cast<const char*>(out), out_stride * bytes,
                                static_cast<char*>(act), act_stride * bytes};
    loraplex::run_over({packed, bias, x, x_stride, out, out_stride, n_rows}, call, plan, n_pairs,
                       [&] { loraplex::run_gated(gated, plan, n_pairs); });
    return 0;
}

// The base's product of x into `out`, and on every row of it the sum over its pairs of the segments'
// product of the pair's row of `pairs`. Pairs of one row are neighbours.
LORAPLEX_API int loraplex_gather_linear(const loraplex::LoraTargetDescriptor* target,
                                        const void* packed, const float* bias, const void* x,
                                        int64_t x_stride, void* out, int64_t out_stride,
                                        int64_t n_rows, const loraplex::LoraSegments* segments,
                                        const int64_t* pair_rows, int64_t n_pairs,
                                        const void* pairs, int64_t pair_stride) {
    loraplex::Plan& plan = loraplex::own_plan();
    const int64_t width = loraplex::n_columns(*target);
    plan.pairs.assign(n_pairs * width * (target->dtype == loraplex::kBFloat16 ? 2 : 4), 0);
    if (!loraplex::rows_are_in(pair_rows, n_pairs, n_rows)) return 4;
    const loraplex::Call call(*target, pairs, pair_stride, plan.pairs.data(), width, *segments);
    if (const int failed = loraplex::check(call, n_pairs)) return failed;
    loraplex::run_over({packed, bias, x, x_stride, out, out_stride, n_rows}, call, plan, n_pairs,
                       [&] { loraplex::run(call, plan); });
    loraplex::add_pairs(call, pair_rows, n_pairs, static_cast<char*>(out), out_stride);
    return 0;
}
