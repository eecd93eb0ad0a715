// Any CPU: short arrays that the compiler turns into whatever vectors the baseline offers.
#include "block_linear.h"

namespace cllm {
namespace {

#include "half.h"

#include "block_linear_plain.h"

struct Simd : Plain<Simd, 8> {
    static constexpr int64_t kWidth = 8;
    static constexpr int kAccumulators = 12;
    struct Vec {
        float lane[kWidth];
    };

    template <typename F>
    static Vec each(F f) {
        Vec out;
        for (int64_t i = 0; i < kWidth; ++i) out.lane[i] = f(i);
        return out;
    }
    static Vec load(const float* data) {
        return each([&](int64_t i) { return data[i]; });
    }
    static Vec load_bf16(const uint16_t* data) {
        return each([&](int64_t i) { return widen_bf16(data[i]); });
    }
    static Vec load_f16(const uint16_t* data) {
        return each([&](int64_t i) { return widen_f16(data[i]); });
    }
    static Vec held(const Vec& x) { return x; }
    static void store(float* data, const Vec& x) { __builtin_memcpy(data, x.lane, sizeof x.lane); }
    static Vec fill(float value) {
        return each([&](int64_t) { return value; });
    }
    static Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
        return each([&](int64_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static float reduce_add(const Vec& a) {
        float sum = 0.0f;
        for (float value : a.lane) sum += value;
        return sum;
    }
    // always_inline: gcc takes a function that only prefetches for one that does nothing
    __attribute__((always_inline)) static void prefetch(const void* place) {
        __builtin_prefetch(place, 0, 2);
    }
};

#include "block_linear_body.h"
#include "block_linear_types.h"

}  // namespace

const BlockLinearKernels kBlockLinearScalar{span, make_input, sizeof(float)};

}  // namespace cllm
