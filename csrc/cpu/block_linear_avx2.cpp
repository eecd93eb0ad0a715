// Compiled with AVX2 flags and called only where the CPU has it.
#include "block_linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace cllm {
namespace {

#include "half.h"

#include "block_linear_plain.h"

struct Simd : Plain<Simd, 8> {
    using Vec = __m256;
    static constexpr int64_t kWidth = 8;
    static constexpr int kAccumulators = 12;  // of 16 registers

    static Vec load(const float* data) { return _mm256_loadu_ps(data); }
    static Vec load_bf16(const uint16_t* data) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static Vec load_f16(const uint16_t* data) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
    }
    // In a register.
    static Vec held(Vec x) {
        asm("" : "+x"(x));
        return x;
    }
    static void store(float* data, Vec x) { _mm256_storeu_ps(data, x); }
    static Vec fill(float value) { return _mm256_set1_ps(value); }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static float reduce_add(Vec a) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    // Into L2: a line that is asked for into L1 holds up the loads of others while it comes.
    // always_inline: gcc takes a function that only prefetches for one that does nothing.
    __attribute__((always_inline)) static void prefetch(const void* place) {
        _mm_prefetch(static_cast<const char*>(place), _MM_HINT_T1);
    }
};

#include "block_linear_body.h"
#include "block_linear_types.h"

}  // namespace

const BlockLinearKernels kBlockLinearAvx2{span, make_input, sizeof(float)};

}  // namespace cllm
#endif
