// What row_argmax and linear_argmax share: scans of one row, compiled once per instruction set.
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

struct ArgmaxKernels {
    // First position of the largest element of data [count]; NaN counts as larger than everything.
    Best (*span)(const void* data, Dtype dtype, int64_t count);
    // The largest x, or NaN if there is one.
    float (*largest)(const Scores& scores);
    // First position >= begin with x >= threshold, or count. With threshold NaN: the first NaN.
    int64_t (*first_at_least)(const Scores& scores, int64_t begin, float threshold);
    // sum of a[i] * b[i] over 16-bit operands [width], accumulated in fp32.
    float (*dot)(const void* a, const void* b, Dtype dtype, int64_t width);
};

extern const ArgmaxKernels kArgmaxScalar;
#if defined(__x86_64__)
extern const ArgmaxKernels kArgmaxAvx2;
extern const ArgmaxKernels kArgmaxAvx512;
#endif

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
