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
    using Ints = __m512i;  // sixteen of 32 bits
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

    static void store(float* data, Vec a) { _mm512_storeu_ps(data, a); }
    static Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
    static Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
    static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
    static Vec absolute(Vec a) { return _mm512_abs_ps(a); }
    // Whether a lane lies above the bound or is NaN.
    static bool exceeds(Vec a, float bound) {
        return _mm512_cmp_ps_mask(a, _mm512_set1_ps(bound), _CMP_NLE_UQ) != 0;
    }
    static Ints fill_ints(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
    static Ints count_from(uint32_t first) {
        return _mm512_add_epi32(fill_ints(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9,
                                                                    10, 11, 12, 13, 14, 15));
    }
    static Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static Ints subtract_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
    static Ints xor_ints(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
    template <int kBits>
    static Ints arithmetic_right(Ints a) {
        return _mm512_srai_epi32(a, kBits);
    }
    template <int kBits>
    static Ints left(Ints a) {
        return _mm512_slli_epi32(a, kBits);
    }
    static Vec to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Ints as_ints(Vec a) { return _mm512_castps_si512(a); }
    static Vec as_floats(Ints a) { return _mm512_castsi512_ps(a); }
    static Vec select_negative(Ints sign, Vec a, Vec b) {
        return _mm512_mask_blend_ps(_mm512_movepi32_mask(sign), b, a);
    }
    static Vec select_zero(Ints zero, Vec a, Vec b) {
        return _mm512_mask_blend_ps(_mm512_testn_epi32_mask(zero, zero), b, a);
    }
    // 32 x 32 -> 64 bits, unsigned: the even lanes and the odd ones each give eight products.
    static void multiply_wide(Ints a, uint32_t factor, Ints& high, Ints& low) {
        const Ints b = fill_ints(factor);
        const Ints even = _mm512_mul_epu32(a, b);
        const Ints odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
        high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
        low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
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
#include "noise_body.h"
#include "perturbed_body.h"

}  // namespace

const ArgmaxKernels kArgmaxAvx512{span, largest, first_at_least, dot, perturbed, noise_row};

}  // namespace cllm
#endif
