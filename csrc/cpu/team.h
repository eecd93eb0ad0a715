// The threads of a parallel region.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace cllm {

// How many share the work of the region that the caller is in.
inline int64_t team_size() {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

}  // namespace cllm
