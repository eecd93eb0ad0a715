// The norm of Llama's layers over rows, by the same code as inside decoder_layer.
#include <algorithm>

#include "decoder_layer.h"

namespace cllm {
namespace {

// Enough work to be worth waking a thread: some microseconds of reading and writing.
constexpr int64_t kElementsPerThread = 1 << 15;

}  // namespace

void rms_norm_cpu(const void* x, const void* weight, Dtype dtype, int64_t rows, int64_t width,
                  float eps, void* out, int threads) {
    const DecoderLayerKernels& kernels = decoder_layer_kernels();
    const int64_t bytes = width * (dtype == Dtype::kFloat32 ? 4 : 2);
    const int64_t useful = rows * width / kElementsPerThread + 1;
    const int workers = static_cast<int>(std::min<int64_t>(threads, useful));
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t row = 0; row < rows; ++row) {
        kernels.rms_norm(static_cast<const char*>(x) + row * bytes, weight, dtype, width, eps,
                         static_cast<char*>(out) + row * bytes);
    }
}

}  // namespace cllm
