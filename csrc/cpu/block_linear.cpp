// A linear layer for the few rows of a block: the weight is read once, by all threads together.
#include "block_linear.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "scratch.h"
#include "team.h"

namespace cllm {
namespace {

const BlockLinearKernels& kernels(const BlockLinear& linear) {
#if defined(__x86_64__)
    switch (cpu_isa()) {
        case Isa::kAvx512:
            // dot products of pairs want both of a pair beside each other
            return linear.dtype == Dtype::kBFloat16 && !linear.across && cpu_has_bf16_dot()
                       ? kBlockLinearAvx512Bf16
                       : kBlockLinearAvx512;
        case Isa::kAvx2:
            return kBlockLinearAvx2;
        default:
            return kBlockLinearScalar;
    }
#else
    (void)linear;
    return kBlockLinearScalar;
#endif
}

int64_t padded_width(int64_t width) {
    return (width + kBlockLinearPadding - 1) / kBlockLinearPadding * kBlockLinearPadding;
}

// Whether the kernel takes x as it is.
bool taken_as_it_is(const BlockLinear& linear, const BlockLinearKernels& kernel) {
    const int64_t size = linear.dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t padded = padded_width(linear.width);
    return size == kernel.input_bytes && linear.width == padded && linear.x_stride == padded;
}

// What `input` makes of all rows of x.
int64_t input_bytes(const BlockLinear& linear, const BlockLinearKernels& kernel) {
    if (taken_as_it_is(linear, kernel)) return 0;
    return whole_lines(linear.rows * padded_width(linear.width) * kernel.input_bytes);
}

bool has_low_rank(const BlockLinear& linear) { return linear.rank > 0 && linear.a != nullptr; }

int64_t low_bytes(const BlockLinear& linear, const BlockLinearKernels& kernel) {
    if (!has_low_rank(linear)) return 0;
    return whole_lines(linear.rows * padded_width(linear.rank) * kernel.input_bytes);
}

// Columns first .. last - 1 of the first of the two products of the low-rank term, itself a linear
// layer, into `low`; zeros in the rows that are not gated, and behind the rank.
void shrink(const BlockLinear& linear, const BlockLinearKernels& kernel, const char* x,
            int64_t padded, char* low, int64_t first, int64_t last) {
    const int64_t bytes = kernel.input_bytes, padded_rank = padded_width(linear.rank);
    BlockLinear shrunk = linear;
    shrunk.weight = linear.a;
    shrunk.bias = shrunk.a = shrunk.b = nullptr;
    shrunk.weight_stride = linear.width;
    shrunk.columns = linear.rank;
    shrunk.out_stride = padded_rank;
    shrunk.out_dtype = bytes == 4 ? Dtype::kFloat32 : linear.dtype;
    const auto clear = [&](int64_t row, int64_t from, int64_t to) {
        std::memset(low + (row * padded_rank + from) * bytes, 0,
                    static_cast<size_t>((to - from) * bytes));
    };
    if (last == linear.rank && last < padded_rank) {
        for (int64_t r = 0; r < linear.rows; ++r) clear(r, last, padded_rank);
    }
    const bool all = linear.gated_from <= 0;
    const int64_t period = all ? linear.rows : linear.period;
    for (int64_t begin = 0; begin < linear.rows; begin += period) {
        const int64_t end = std::min(begin + period, linear.rows);
        const int64_t gated = all ? begin : std::min(begin + linear.gated_from, end);
        for (int64_t r = begin; r < gated; ++r) clear(r, first, last);
        if (gated == end) continue;
        shrunk.rows = end - gated;
        shrunk.out = low + gated * padded_rank * bytes;
        kernel.span(shrunk, {x + gated * padded * bytes, nullptr, padded, 0}, first, last);
    }
}

// A multiple of every number of weights per tile (block_linear_body.h), so that few are left.
constexpr int64_t kUnit = 12;
// Whole lines of a weight that lies across.
constexpr int64_t kUnitAcross = 32;

int64_t unit_of(const BlockLinear& linear) { return linear.across ? kUnitAcross : kUnit; }

}  // namespace

int64_t block_linear_scratch(const BlockLinear* linears, int64_t count) {
    const BlockLinearKernels& kernel = kernels(linears[0]);
    int64_t bytes = input_bytes(linears[0], kernel);
    for (int64_t i = 0; i < count; ++i) bytes += low_bytes(linears[i], kernel);
    return bytes;
}

void block_linears_in_team(const BlockLinear* linears, int64_t count, char* scratch) {
    const BlockLinear& shared = linears[0];
    const BlockLinearKernels& kernel = kernels(shared);
    const int64_t padded = padded_width(shared.width), workers = team_size();
    const auto* x = static_cast<const char*>(shared.x);
    if (!taken_as_it_is(shared, kernel)) {
        const int64_t size = shared.dtype == Dtype::kFloat32 ? 4 : 2;
        const int64_t row_bytes = padded * kernel.input_bytes;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < shared.rows; ++r) {
            const char* const data =
                static_cast<const char*>(shared.x) + r * shared.x_stride * size;
            kernel.input(data, shared.dtype, shared.width, scratch + r * row_bytes, padded);
        }
        x = scratch;
        scratch += input_bytes(shared, kernel);
    }
    // The low-rank products first: all of one is needed for any column of its layer.
    char* low = scratch;
    bool gated = false;
    for (int64_t i = 0; i < count; ++i) {
        const BlockLinear& linear = linears[i];
        if (!has_low_rank(linear)) continue;
        gated = true;
#pragma omp for schedule(static) nowait
        for (int64_t worker = 0; worker < workers; ++worker) {
            const int64_t first = linear.rank * worker / workers;
            const int64_t last = linear.rank * (worker + 1) / workers;
            if (first < last) shrink(linear, kernel, x, padded, low, first, last);
        }
        low += low_bytes(linear, kernel);
    }
    if (gated) {
#pragma omp barrier
    }
    low = scratch;
    for (int64_t i = 0; i < count; ++i) {
        const BlockLinear& linear = linears[i];
        const bool with_low = has_low_rank(linear);
        const BlockLinearInput input{x, with_low ? low : nullptr, padded,
                                     with_low ? padded_width(linear.rank) : 0};
        const int64_t unit = unit_of(linear), units = (linear.columns + unit - 1) / unit;
#pragma omp for schedule(static) nowait
        for (int64_t worker = 0; worker < workers; ++worker) {
            const int64_t first = units * worker / workers * unit;
            const int64_t last = std::min(units * (worker + 1) / workers * unit, linear.columns);
            if (first < last) kernel.span(linear, input, first, last);
        }
        low += low_bytes(linear, kernel);
    }
#pragma omp barrier
}

void block_linear_cpu(const BlockLinear& linear, int threads) {
    if (linear.rows == 0 || linear.columns == 0) return;
    // Reading so many weights takes as long as waking a thread.
    constexpr int64_t kWeightsPerThread = 1 << 15;
    static thread_local Scratch kept;
    std::unique_ptr<char[]> large;
    char* const scratch = kept.take(block_linear_scratch(&linear, 1), large);
    const int64_t unit = unit_of(linear), units = (linear.columns + unit - 1) / unit;
    const int64_t useful = linear.columns * linear.width / kWeightsPerThread + 1;
    const int64_t workers = std::min({static_cast<int64_t>(threads), useful, units});
    (void)workers;  // unused by a compiler without OpenMP
#pragma omp parallel num_threads(static_cast<int>(workers)) if (workers > 1)
    block_linears_in_team(&linear, 1, scratch);
}

}  // namespace cllm
