// The argmax half of linear_argmax on the CPU: the vendor's matmul gives the scores of one chunk of
// the vocabulary at a time, these functions fold them into the running winner while they are in
// cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "argmax.h"

namespace cllm {
namespace {

constexpr int64_t kElementsPerThread = 1 << 16;
constexpr int64_t kNoisyElementsPerThread = 1 << 13;

// What becomes of a score before the noise; it never decreases as the score rises.
struct Scaling {
    float softcap;
    float scale;
    float operator()(float x) const {
        return (softcap > 0.0f ? softcap * std::tanh(x / softcap) : x) * scale;
    }
    // The largest value it takes; only a soft-cap sets one.
    float ceiling() const {
        return softcap > 0.0f ? softcap * scale : std::numeric_limits<float>::infinity();
    }
};

// fp32 numbers and integers in the same order, to halve the distance between two of them.
int32_t to_ordered(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >= 0 ? bits : static_cast<int32_t>(0x80000000u) - bits;
}

float from_ordered(int32_t key) {
    const int32_t bits = key >= 0 ? key : static_cast<int32_t>(0x80000000u) - key;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The smallest number that is sent as high as x: which scores tie with the best one afterwards (all
// of a row that the soft-cap saturates, say) is then told by one comparison each, instead of one
// tanh each.
float lowest_equal(float x, const Scaling& scaling) {
    if (!(scaling.softcap > 0.0f) && scaling.scale == 1.0f) return x;
    const float target = scaling(x);
    int64_t high = to_ordered(x);
    int64_t low = to_ordered(-std::numeric_limits<float>::infinity());
    if (scaling(from_ordered(static_cast<int32_t>(low))) >= target) {
        return -std::numeric_limits<float>::infinity();
    }
    while (high - low > 1) {
        const int64_t middle = (high + low) / 2;
        if (scaling(from_ordered(static_cast<int32_t>(middle))) >= target) {
            high = middle;
        } else {
            low = middle;
        }
    }
    return from_ordered(static_cast<int32_t>(high));
}

struct Row {
    Scores scores;
    const char* hidden;  // [width], null: the scores are fp32 and need no second look
    const LinearOperands* operands;
    float bias_bound;  // largest finite |bias| of the chunk
};

// How far a true score can lie from its 16-bit rounding near the winning score: half a unit in the
// last place, which is 2^-8 (bf16) or 2^-11 (fp16) of the rounded score, and that is x - bias.
float rounding_margin(const Row& row, float best) {
    if (row.scores.bias == nullptr || !std::isfinite(best)) return 0.0f;
    const float unit = row.scores.dtype == Dtype::kBFloat16 ? 0.00390625f : 0.00048828125f;
    return 2.0f * unit * (std::fabs(best) + row.bias_bound) / (1.0f - 2.0f * unit);
}

void update(const ArgmaxKernels& kernels, const Row& row, const Scaling& scaling, int64_t first,
            int64_t* index, float* value) {
    if (*index >= 0 && std::isnan(*value)) return;
    const float best = kernels.largest(row.scores);
    if (std::isnan(best)) {
        *index = first + kernels.first_at_least(row.scores, 0, best);
        *value = best;
        return;
    }
    if (row.hidden == nullptr) {
        const float score = scaling(best);
        if (*index >= 0 && !(score > *value)) return;
        *index = first + kernels.first_at_least(row.scores, 0, lowest_equal(best, scaling));
        *value = score;
        return;
    }
    // Rounding is monotone: without a bias the true winner is among the scores equal to the largest
    // rounded one, with a bias among those within the margin.
    const float margin = rounding_margin(row, best);
    const float threshold = lowest_equal(best - margin, scaling) - margin;
    const size_t weight_row = static_cast<size_t>(row.operands->weight_stride) * 2;
    for (int64_t i = kernels.first_at_least(row.scores, 0, threshold); i < row.scores.count;
         i = kernels.first_at_least(row.scores, i + 1, threshold)) {
        const char* weight = static_cast<const char*>(row.operands->weight) + i * weight_row;
        float score = kernels.dot(row.hidden, weight, row.scores.dtype, row.operands->width);
        if (row.scores.bias != nullptr) score += row.scores.bias[i];
        score = scaling(score);
        if (*index < 0 || score > *value || std::isnan(score)) {
            *index = first + i;
            *value = score;
            if (std::isnan(score) || score >= scaling.ceiling()) return;
        }
    }
}

void running(const ScoreChunk& chunk, const LinearOperands* operands, int64_t* index, float* value,
             int threads) {
    const ArgmaxKernels& kernels = argmax_kernels();
    const Rows& table = chunk.scores;
    const bool noisy = chunk.noise.seed != nullptr;
    const int64_t useful =
        table.rows * table.columns / (noisy ? kNoisyElementsPerThread : kElementsPerThread) + 1;
    const int workers = static_cast<int>(std::min<int64_t>(threads, useful));
    (void)workers;  // unused by a compiler without OpenMP
    const int64_t size = table.dtype == Dtype::kFloat32 ? 4 : 2;
    const Scaling scaling{chunk.softcap, chunk.scale};
    float bias_bound = 0.0f;
    if (operands != nullptr && chunk.bias != nullptr && !noisy) {
        for (int64_t i = 0; i < table.columns; ++i) {
            const float magnitude = std::fabs(chunk.bias[i]);
            // -inf bans a token: it is no measure of how far rounding reaches.
            if (std::isfinite(magnitude)) bias_bound = std::max(bias_bound, magnitude);
        }
    }
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t r = 0; r < table.rows; ++r) {
        const char* data = static_cast<const char*>(table.data) + r * table.inner_stride * size;
        const char* hidden = nullptr;
        if (operands != nullptr) {
            hidden =
                static_cast<const char*>(operands->hidden) + r * operands->hidden_stride * size;
        }
        const Scores scores{data, chunk.bias, table.dtype, table.columns};
        if (noisy) {
            const PerturbedRow row{scores,      scaling.softcap,           scaling.scale,
                                   chunk.first, noise_key(chunk.noise, r), hidden,
                                   operands};
            kernels.perturbed(row, index + r, value + r);
        } else {
            const Row row{scores, hidden, operands, bias_bound};
            update(kernels, row, scaling, chunk.first, index + r, value + r);
        }
    }
}

}  // namespace

void running_argmax_cpu(const ScoreChunk& chunk, int64_t* index, float* value, int threads) {
    running(chunk, nullptr, index, value, threads);
}

void running_argmax_exact_cpu(const ScoreChunk& chunk, const LinearOperands& operands,
                              int64_t* index, float* value, int threads) {
    running(chunk, &operands, index, value, threads);
}

}  // namespace cllm
