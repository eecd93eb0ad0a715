// Compiled with AVX-512 flags and called only where the CPU has it.
#include "argmax.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

namespace cllm {
namespace {

struct Simd {
    using Vec = __m512;
    using Nan = __mmask16;
    using Keys = __m512i;
    static constexpr int64_t kWidth = 16;
    static constexpr int64_t kKeyWidth = 32;

    static Vec load(const float* data) { return _mm512_loadu_ps(data); }
    static Vec load_bf16(const uint16_t* data) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static Vec load_f16(const uint16_t* data) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
    }
    static Vec fill(float value) { return _mm512_set1_ps(value); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
    static float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
    static Nan no_nan() { return 0; }
    // One unordered comparison looks at two vectors.
    static Nan note_nan(Nan seen, Vec a, Vec b) {
        return _kor_mask16(seen, _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q));
    }
    static bool any_nan(Nan seen) { return seen != 0; }
    static uint32_t nan_bits(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
    static uint32_t at_least_bits(Vec a, float threshold) {
        return _mm512_cmp_ps_mask(a, _mm512_set1_ps(threshold), _CMP_GE_OQ);
    }

    static Keys load_keys(const uint16_t* data) {
        const __m512i bits = _mm512_loadu_si512(data);
        // bits ^ (sign & 0x7fff): truth table of a ^ (b & c)
        return _mm512_ternarylogic_epi32(bits, _mm512_srai_epi16(bits, 15),
                                         _mm512_set1_epi16(0x7fff), 0x78);
    }
    static Keys fill_keys(int16_t key) { return _mm512_set1_epi16(key); }
    static Keys max_keys(Keys a, Keys b) { return _mm512_max_epi16(a, b); }
    static Keys min_keys(Keys a, Keys b) { return _mm512_min_epi16(a, b); }
    static int16_t reduce_max_keys(Keys a) {
        const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(a, 16), 16);
        const __m512i odd = _mm512_srai_epi32(a, 16);
        return static_cast<int16_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(even, odd)));
    }
    static int16_t reduce_min_keys(Keys a) {
        const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(a, 16), 16);
        const __m512i odd = _mm512_srai_epi32(a, 16);
        return static_cast<int16_t>(_mm512_reduce_min_epi32(_mm512_min_epi32(even, odd)));
    }
    static bool equals_any(const uint16_t* data, uint16_t pattern) {
        return _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(data),
                                       _mm512_set1_epi16(static_cast<int16_t>(pattern))) != 0;
    }
};

#include "argmax_body.h"

}  // namespace

const ArgmaxKernels kArgmaxAvx512{span, largest, first_at_least, dot};

}  // namespace cllm
#endif
