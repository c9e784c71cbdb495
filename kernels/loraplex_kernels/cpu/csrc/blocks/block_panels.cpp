// Packs rows of a GGUF tensor to panels in blocks, and reads rows of panels.
#include <algorithm>

#include "blocks/block_values.h"
#include "dispatch/cpu_features.h"
#include "dispatch/openmp.h"

namespace loraplex {
namespace {

template <class F>
void pack_rows(const uint8_t* rows, int64_t n_rows, int64_t n_in, uint8_t* panels) {
    const F* format = nullptr;
    const int64_t units = n_units(n_in, F::kBlocks), bytes = unit_bytes(format);
    const int64_t panel_bytes = units * F::kUnitBytes;
#pragma omp parallel for
    for (int64_t first = 0; first < n_rows; first += kBlockPanel) {
        uint8_t* panel = panels + first / kBlockPanel * panel_bytes;
        std::memset(panel, 0, panel_bytes);
        const int64_t n = std::min(kBlockPanel, n_rows - first);
        for (int64_t lane = 0; lane < n; ++lane)
            for (int64_t u = 0; u < units; ++u) {
                BlockUnit unit;
                read_unit(format, rows + ((first + lane) * units + u) * bytes, unit);
                write_unit<F>(unit, lane, panel + u * F::kUnitBytes);
            }
    }
}

template <class F>
void read_row(const uint8_t* panel, int64_t lane, int64_t n_in, float* to) {
    for (int64_t b = 0; b < n_in / kBlockInputs; ++b)
        read_block<F>(panel + b / F::kBlocks * F::kUnitBytes, b % F::kBlocks, lane,
                      to + b * kBlockInputs);
}

}  // namespace
}  // namespace loraplex

using namespace loraplex;

// The bytes of a panel of `n_in` inputs, a multiple of 32; 0 if there is no such format.
LORAPLEX_API int64_t loraplex_block_panel_bytes(int64_t format, int64_t n_in) {
#define LORAPLEX_FORMAT_CASE(number, name, ...)                                                    \
    case number: return n_units(n_in, name::kBlocks) * name::kUnitBytes;
    switch (format) { LORAPLEX_BLOCK_FORMATS(LORAPLEX_FORMAT_CASE) }
#undef LORAPLEX_FORMAT_CASE
    return 0;
}

// Packs `n_rows` rows of a GGUF tensor of type `format`. Outputs beyond the last are zero.
LORAPLEX_API void loraplex_pack_blocks(int64_t format, const uint8_t* rows, int64_t n_rows,
                                       int64_t n_in, uint8_t* panels) {
#define LORAPLEX_FORMAT_CASE(number, name, ...)                                                    \
    case number: pack_rows<name>(rows, n_rows, n_in, panels); break;
    switch (format) { LORAPLEX_BLOCK_FORMATS(LORAPLEX_FORMAT_CASE) }
#undef LORAPLEX_FORMAT_CASE
}

// Rows `outputs` [n] of panels, behind their starts at `packed`, to float32 [n, n_in].
LORAPLEX_API void loraplex_read_blocks(const uint8_t* packed, int64_t n_in, const int64_t* outputs,
                                       int64_t n, float* to) {
    const int64_t* starts = reinterpret_cast<const int64_t*>(packed);
#pragma omp parallel for if (n > 64)
    for (int64_t i = 0; i < n; ++i) {
        const int64_t start = starts[outputs[i] / kBlockPanel], lane = outputs[i] % kBlockPanel;
        const uint8_t* panel = packed + (start & ~kFormatMask);
#define LORAPLEX_FORMAT_CASE(number, name, ...)                                                    \
    case number: read_row<name>(panel, lane, n_in, to + i * n_in); break;
        switch (start & kFormatMask) { LORAPLEX_BLOCK_FORMATS(LORAPLEX_FORMAT_CASE) }
#undef LORAPLEX_FORMAT_CASE
    }
}
