// One row of linear_consistency_loss's in-place pass, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "ops.h"

namespace cllm {

// Works on row `row` of the chunk alone, so that rows can go to any thread.
using ConsistencyRow = void (*)(const ConsistencyChunk& chunk, int64_t row);

extern const ConsistencyRow kConsistencyRowScalar;
#if defined(__x86_64__)
extern const ConsistencyRow kConsistencyRowAvx2;
extern const ConsistencyRow kConsistencyRowAvx512;
#endif

}  // namespace cllm
