// Memory of a thread for values that one call of a kernel makes and reads.
#pragma once

#include <cstdint>

namespace loraplex {

// Grows to the largest call of this thread. The next call of `scratch` may move it.
void* scratch(int64_t n_bytes);

}  // namespace loraplex
