// Writes compact panels, and reads single outputs of them. See compact_panels.h.
#include "compact_panels.h"

#include <cstring>

#include "isa.h"

namespace loraplex {
namespace {

constexpr int64_t kStretchValues = kStretchWords * kGroup;

// The bytes of a panel, compact where it can be; writes them unless `panel` is null.
int64_t write_panel(const uint16_t* values, int64_t n_words, uint8_t* panel) {
    int64_t n_bytes = panel_tables_bytes(n_words);
    if (panel) std::memset(panel, 0, n_bytes);
    for (int64_t w = 0; w < n_words; w += kStretchWords, values += kStretchValues) {
        uint8_t table[kTableBytes], place_of[256];
        const bool fits = make_table(values, kStretchValues, table, place_of);
        if (!fits) table[0] = table[1] = 255;
        if (panel) {
            std::memcpy(panel + w / kStretchWords * kTableBytes, table, kTableBytes);
            uint8_t* words = panel + n_bytes;
            if (!fits) {
                std::memcpy(words, values, kPlainStretchBytes);
            } else {
                std::memset(words, 0, kCompactStretchBytes);
                for (int64_t i = 0; i < kStretchWords; ++i)
                    write_row(values + i * kGroup, place_of, static_cast<int>(i % kGroupRows),
                              words + i / kGroupRows * kGroupBytes);
            }
        }
        n_bytes += fits ? kCompactStretchBytes : kPlainStretchBytes;
    }
    return n_bytes;
}

}  // namespace
}  // namespace loraplex

// Plain panels [n_panels, n_words, 32] of words, `n_words` a multiple of 32, made compact. Fills `starts`
// [n_panels + 1]; then, if `panels` is not null, writes the panels there, in front of which `starts` stand
// in the end.
LORAPLEX_API void loraplex_compact_panels(const uint32_t* words, int64_t n_panels, int64_t n_words,
                                          int64_t* starts, uint8_t* panels) {
    using namespace loraplex;
    const int64_t head = ((n_panels + 1) * static_cast<int64_t>(sizeof *starts) + 63) / 64 * 64;
    const uint16_t* const values = reinterpret_cast<const uint16_t*>(words);
    const int64_t n_values = n_words * kPanelOutputs * 2;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n_panels; ++i) {
        uint8_t* const panel = panels ? panels + starts[i] : nullptr;
        const int64_t n_bytes = write_panel(values + i * n_values, n_words, panel);
        if (!panels) starts[i + 1] = n_bytes;
    }
    if (panels) return;
    starts[0] = head;
    for (int64_t i = 0; i < n_panels; ++i) starts[i + 1] += starts[i];
}

// Outputs `ids` [n_ids] of compact panels: their values to `rows` [n_ids, 2 · n_words].
LORAPLEX_API void loraplex_open_outputs(const void* compact, int64_t n_words, const int64_t* ids,
                                        int64_t n_ids, uint16_t* rows) {
    using namespace loraplex;
    const char* const first = static_cast<const char*>(compact);
    const int64_t* const starts = static_cast<const int64_t*>(compact);
    for (int64_t i = 0; i < n_ids; ++i, rows += 2 * n_words) {
        const int column = static_cast<int>(ids[i] % kPanelOutputs * 2);
        Stretch stretch(first + starts[ids[i] / kPanelOutputs], n_words);
        for (int64_t w = 0; w < n_words; ++w) {
            if (w > 0 && w % kStretchWords == 0) stretch.next();
            rows[2 * w] = stretch.value(w % kStretchWords, column);
            rows[2 * w + 1] = stretch.value(w % kStretchWords, column + 1);
        }
    }
}
