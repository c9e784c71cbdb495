// OpenMP, or one thread where the compiler has none. The library links no runtime: torch's serves.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_max_threads() { return 1; }
static inline int omp_get_num_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
#endif
