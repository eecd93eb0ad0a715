// What row_argmax, linear_argmax and gumbel_noise share: scans of one row and its noise, compiled
// once per instruction set.
#pragma once

#include <cstdint>

#include "ops.h"

namespace cllm {

// The winner of a span: its position and, as fp32 (exact for 16-bit types), its value, which is NaN
// if the span holds a NaN; then the position is that of the first.
struct Best {
    float value;
    int64_t index;
};

// One row of scores with its bias, x[i] = data[i] + bias[i].
struct Scores {
    const void* data;   // [count] of dtype
    const float* bias;  // [count], or null
    Dtype dtype;
    int64_t count;
};

// Key and counter of one row of noise, but for the counter word that runs over the vocabulary.
struct NoiseKey {
    uint32_t seed[2];  // low and high word, as of the position
    uint32_t row;
    uint32_t position[2];
};

// One row of a chunk of the vocabulary, to be perturbed: softcap(x) * scale + noise.
struct PerturbedRow {
    Scores scores;
    float softcap;  // 0: none
    float scale;
    int64_t first;  // vocabulary index of the chunk's first column, a multiple of 64
    NoiseKey key;
    const void* hidden;  // [width], null: the scores are fp32 and need no second look
    const LinearOperands* operands;
};

struct ArgmaxKernels {
    // First position of the largest element of data [count]; NaN counts as larger than everything.
    Best (*span)(const void* data, Dtype dtype, int64_t count);
    // The largest x, or NaN if there is one.
    float (*largest)(const Scores& scores);
    // First position >= begin with x >= threshold, or count. With threshold NaN: the first NaN.
    int64_t (*first_at_least)(const Scores& scores, int64_t begin, float threshold);
    // sum of a[i] * b[i] over 16-bit operands [width], accumulated in fp32.
    float (*dot)(const void* a, const void* b, Dtype dtype, int64_t width);
    // Folds a row into the running winner: index < 0 means none yet.
    void (*perturbed)(const PerturbedRow& row, int64_t* index, float* value);
    // out [count]: the noise of vocabulary entries first .. first + count - 1; 64 divides first.
    void (*noise)(const NoiseKey& key, int64_t first, int64_t count, float* out);
};

extern const ArgmaxKernels kArgmaxScalar;
#if defined(__x86_64__)
extern const ArgmaxKernels kArgmaxAvx2;
extern const ArgmaxKernels kArgmaxAvx512;
#endif

inline NoiseKey noise_key(const Noise& noise, int64_t row) {
    const auto seed = static_cast<uint64_t>(*noise.seed);
    const auto position = static_cast<uint64_t>(noise.position[row]);
    return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
            static_cast<uint32_t>(noise.row[row]),
            {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)}};
}

inline const ArgmaxKernels& argmax_kernels() {
#if defined(__x86_64__)
    switch (cpu_isa()) {
        case Isa::kAvx512:
            return kArgmaxAvx512;
        case Isa::kAvx2:
            return kArgmaxAvx2;
        default:
            return kArgmaxScalar;
    }
#else
    return kArgmaxScalar;
#endif
}

}  // namespace cllm
