// Gumbel noise for whole rows of logits; linear_argmax makes its own, block by block.
#include <algorithm>

#include "argmax.h"

namespace cllm {

void gumbel_noise_cpu(const Noise& noise, int64_t rows, int64_t vocabulary, float* out,
                      int threads) {
    constexpr int64_t kElementsPerThread = 1 << 13;
    constexpr int64_t kPiece = 1 << 12;  // a multiple of the 64 entries that are made together
    const ArgmaxKernels& kernels = argmax_kernels();
    const int64_t pieces = (vocabulary + kPiece - 1) / kPiece;
    const int64_t useful = rows * vocabulary / kElementsPerThread + 1;
    const int workers = static_cast<int>(std::min<int64_t>(threads, useful));
    (void)workers;  // unused by a compiler without OpenMP
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t task = 0; task < rows * pieces; ++task) {
        const int64_t row = task / pieces, first = (task % pieces) * kPiece;
        kernels.noise(noise_key(noise, row), first, std::min(kPiece, vocabulary - first),
                      out + row * vocabulary + first);
    }
}

}  // namespace cllm
