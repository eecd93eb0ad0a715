// Compiled with AVX-512 and its bf16 dot products, and called only where the CPU has them. Such an
// instruction multiplies twice as many weights as one for fp32, and nothing has to be widened.
#include "block_linear.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

namespace cllm {
namespace {

#include "half.h"

#include "block_linear_simd512.h"

#include "block_linear_body.h"

struct Pairs : BFloat16 {
    using Input = uint16_t;
    static constexpr int64_t kStep = 32;
    static __m512bh load(const uint16_t* data) {
        return reinterpret_cast<__m512bh>(_mm512_loadu_si512(data));
    }
    static __m512bh load_some(const uint16_t* data, int64_t count) {
        const auto first = static_cast<__mmask32>((1ull << count) - 1);
        return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(first, data));
    }
    static __m512bh load_input(const uint16_t* data) { return load(data); }
    static Vec multiply_add(__m512bh a, __m512bh b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
};

void span(const BlockLinear& linear, const BlockLinearInput& input, int64_t first, int64_t last) {
    if (linear.out_dtype == Dtype::kFloat32) {
        typed_span<Pairs, Float32>(linear, input, first, last);
    } else {
        typed_span<Pairs, BFloat16>(linear, input, first, last);
    }
}

void make_input(const void* data, Dtype, int64_t count, void* out, int64_t padded) {
    __builtin_memcpy(out, data, count * sizeof(uint16_t));
    __builtin_memset(static_cast<uint16_t*>(out) + count, 0, (padded - count) * sizeof(uint16_t));
}

}  // namespace

const BlockLinearKernels kBlockLinearAvx512Bf16{span, make_input, sizeof(uint16_t)};

}  // namespace cllm
#endif
