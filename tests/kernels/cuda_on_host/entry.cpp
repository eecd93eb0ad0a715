// The launchers under names that ctypes finds.
#include "ops.h"

extern "C" const char* consistency_chunk(const cllm::ConsistencyChunk* chunk) {
    return cllm::consistency_chunk_cuda(*chunk, 0, nullptr);
}
extern "C" const char* jacobi_step(const cllm::JacobiStep* step) {
    return cllm::jacobi_step_cuda(*step, 0, nullptr);
}
