// Logits that a grammar allows.
#include <cstdint>

#include "dispatch/kernel_set.h"

// Copies the logits whose bit in `mask` is set, and their indices, both in order. `values` and `ids`
// have room for n_tokens. Returns how many there are.
LORAPLEX_API int64_t loraplex_select_allowed(const float* logits, const uint32_t* mask,
                                             int64_t n_tokens, float* values, int32_t* ids) {
    int64_t n_found = 0;
    for (int64_t first = 0; first < n_tokens; first += 32) {
        uint32_t allowed = mask[first / 32];
        if (n_tokens - first < 32) allowed &= (1u << (n_tokens - first)) - 1;
        for (; allowed; allowed &= allowed - 1) {
            const int64_t token = first + __builtin_ctz(allowed);
            values[n_found] = logits[token];
            ids[n_found++] = static_cast<int32_t>(token);
        }
    }
    return n_found;
}
