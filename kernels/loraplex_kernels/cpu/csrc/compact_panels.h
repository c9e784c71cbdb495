// Packed weights of the base in twelve bits a value and without loss, as compact.h does it for factors.
//
// A panel (linear.inc) is cut into stretches of 32 words of k, 64 values of each of its outputs, which share
// one table of sixteen high bytes. All tables of a panel come first, padded to 64 bytes, then the stretches:
// sixteen groups each, and a group holds two words in a row as compact.h's group holds two rank rows, the 32
// pairs of a word being its 64 values. A stretch of more high bytes stays plain, 32 words, and its table begins
// with 255 twice, which no other does, as high bytes ascend.
//
// The whole begins with where each panel starts, in bytes from there, and where the last one ends. Its address
// is passed with kCompactPanels added; plain panels start at a multiple of four.
#pragma once

#include <cstdint>

#include "compact.h"

namespace loraplex {

constexpr int64_t kCompactPanels = 1;
constexpr int64_t kPanelOutputs = 32;
constexpr int64_t kStretchWords = 32;
constexpr int64_t kPlainStretchBytes = kStretchWords * kPanelOutputs * 4;
constexpr int64_t kCompactStretchBytes = kStretchWords / kGroupRows * kGroupBytes;

namespace {

inline int64_t panel_tables_bytes(int64_t n_words) {
    return (n_words / kStretchWords * kTableBytes + 63) / 64 * 64;
}

// Where a thread stands in the stretches of a panel.
struct Stretch {
    const uint8_t* table;
    const uint8_t* words;

    Stretch(const char* panel, int64_t n_words)
        : table(reinterpret_cast<const uint8_t*>(panel)),
          words(table + panel_tables_bytes(n_words)) {}
    bool is_plain() const { return table[0] == 255 && table[1] == 255; }
    void next() {
        words += is_plain() ? kPlainStretchBytes : kCompactStretchBytes;
        table += kTableBytes;
    }
    // Its value in `column` of word `w`: output column / 2, the even or odd one of a pair of k.
    uint16_t value(int64_t w, int column) const {
        if (is_plain()) return reinterpret_cast<const uint16_t*>(words)[w * kGroup + column];
        return read_value(words + w / kGroupRows * kGroupBytes, static_cast<int>(w % kGroupRows),
                          table, column);
    }
};

}  // namespace
}  // namespace loraplex
