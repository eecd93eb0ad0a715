// The in-place pass of linear_consistency_loss on the CPU: rows over threads.
#include "consistency.h"

#include <algorithm>

namespace cllm {
namespace {

ConsistencyRow row_kernel() {
#if defined(__x86_64__)
    switch (cpu_isa()) {
        case Isa::kAvx512:
            return kConsistencyRowAvx512;
        case Isa::kAvx2:
            return kConsistencyRowAvx2;
        default:
            return kConsistencyRowScalar;
    }
#else
    return kConsistencyRowScalar;
#endif
}

}  // namespace

void consistency_chunk_cpu(const ConsistencyChunk& chunk, int threads) {
    // A pair of logits takes a few nanoseconds; waking a thread takes microseconds.
    constexpr int64_t kPairsPerThread = 1 << 13;
    const int64_t useful = chunk.rows * chunk.columns / kPairsPerThread + 1;
    const int workers = static_cast<int>(std::min<int64_t>(threads, useful));
    (void)workers;  // unused by a compiler without OpenMP
    const ConsistencyRow kernel = row_kernel();
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t row = 0; row < chunk.rows; ++row) kernel(chunk, row);
}

}  // namespace cllm
