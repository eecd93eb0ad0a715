// A linear layer for the few rows of a block: the weight is read once, by all threads together.
#include "block_linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace cllm {
namespace {

const BlockLinearKernels& kernels(Dtype dtype) {
#if defined(__x86_64__)
    switch (cpu_isa()) {
        case Isa::kAvx512:
            return dtype == Dtype::kBFloat16 && cpu_has_bf16_dot() ? kBlockLinearAvx512Bf16
                                                                   : kBlockLinearAvx512;
        case Isa::kAvx2:
            return kBlockLinearAvx2;
        default:
            return kBlockLinearScalar;
    }
#else
    (void)dtype;
    return kBlockLinearScalar;
#endif
}

constexpr int64_t kLine = 64;  // vectors that straddle cache lines are read at half the speed

char* aligned(std::vector<char>& buffer, int64_t bytes) {
    if (buffer.size() < static_cast<size_t>(bytes + kLine)) buffer.resize(bytes + kLine);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    return buffer.data() + (kLine - address % kLine) % kLine;
}

int64_t padded_width(int64_t width) {
    return (width + kBlockLinearPadding - 1) / kBlockLinearPadding * kBlockLinearPadding;
}

// The rows as the kernel takes them: x itself where it is that already.
const void* inputs(const BlockLinear& linear, const BlockLinearKernels& kernel, int64_t padded,
                   std::vector<char>& buffer) {
    const int64_t size = linear.dtype == Dtype::kFloat32 ? 4 : 2;
    if (size == kernel.input_bytes && linear.width == padded && linear.x_stride == padded) {
        return linear.x;
    }
    const int64_t row_bytes = padded * kernel.input_bytes;
    char* const rows = aligned(buffer, linear.rows * row_bytes);
    for (int64_t r = 0; r < linear.rows; ++r) {
        const char* const data = static_cast<const char*>(linear.x) + r * linear.x_stride * size;
        kernel.input(data, linear.dtype, linear.width, rows + r * row_bytes, padded);
    }
    return rows;
}

// The first of the two products of the low-rank term, itself a linear layer, into `low`.
BlockLinear shrinking(const BlockLinear& linear, const BlockLinearKernels& kernel, void* low,
                      int64_t padded_rank) {
    BlockLinear shrunk = linear;
    shrunk.weight = linear.a;
    shrunk.bias = shrunk.a = shrunk.b = nullptr;
    shrunk.weight_stride = linear.width;
    shrunk.columns = linear.rank;
    shrunk.out = low;
    shrunk.out_stride = padded_rank;
    if (kernel.input_bytes == 4) shrunk.out_dtype = Dtype::kFloat32;
    return shrunk;
}

// What keeps the term out of rows that are not gated, whatever came of the product there.
void silence(const BlockLinear& linear, char* low, int64_t row_bytes, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < linear.rows; ++r) {
        if (r % linear.period >= linear.gated_from) continue;
        std::memset(low + r * row_bytes + begin, 0, static_cast<size_t>(end - begin));
    }
}

}  // namespace

void block_linear_cpu(const BlockLinear& linear, int threads) {
    if (linear.rows == 0 || linear.columns == 0) return;
    // Reading so many weights takes as long as waking a thread.
    constexpr int64_t kWeightsPerThread = 1 << 15;
    // A multiple of every number of weights per tile (block_linear_body.h), so that few are left.
    constexpr int64_t kUnit = 12;
    static thread_local std::vector<char> x_buffer, low_buffer;
    const BlockLinearKernels& kernel = kernels(linear.dtype);
    const int64_t padded = padded_width(linear.width);
    const void* const x = inputs(linear, kernel, padded, x_buffer);
    const int64_t units = (linear.columns + kUnit - 1) / kUnit;
    const int64_t useful = linear.columns * linear.width / kWeightsPerThread + 1;
    const int64_t workers = std::min({static_cast<int64_t>(threads), useful, units});

    const bool gated = linear.rank > 0 && linear.a != nullptr;
    const int64_t padded_rank = padded_width(linear.rank);
    const int64_t low_bytes = padded_rank * kernel.input_bytes;
    char* const low = gated ? aligned(low_buffer, linear.rows * low_bytes) : nullptr;
    // behind the rank there are zeros
    if (gated) std::memset(low, 0, static_cast<size_t>(linear.rows * low_bytes));
    const BlockLinearInput input{x, low, padded, padded_rank};
#pragma omp parallel num_threads(static_cast<int>(workers)) if (workers > 1)
    {
        if (gated) {
            const BlockLinear shrunk = shrinking(linear, kernel, low, padded_rank);
            const BlockLinearInput narrow{x, nullptr, padded, 0};
#pragma omp for schedule(static)
            for (int64_t worker = 0; worker < workers; ++worker) {
                const int64_t first = linear.rank * worker / workers;
                const int64_t last = linear.rank * (worker + 1) / workers;
                if (first == last) continue;
                kernel.span(shrunk, narrow, first, last);
                silence(linear, low, low_bytes, first * kernel.input_bytes,
                        last * kernel.input_bytes);
            }
        }
#pragma omp for schedule(static)
        for (int64_t worker = 0; worker < workers; ++worker) {
            const int64_t first = units * worker / workers * kUnit;
            const int64_t last = std::min(units * (worker + 1) / workers * kUnit, linear.columns);
            kernel.span(linear, input, first, last);
        }
    }
}

}  // namespace cllm
