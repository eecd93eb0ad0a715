// Compiled with AVX2 flags and called only where the CPU has it.
#include "argmax.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace cllm {
namespace {

struct Simd {
    using Vec = __m256;
    using Ints = __m256i;  // eight of 32 bits
    using Nan = __m256;
    using Keys = __m256i;
    static constexpr int64_t kWidth = 8;
    static constexpr int64_t kKeyWidth = 16;

    static Vec load(const float* data) { return _mm256_loadu_ps(data); }
    static Vec load_bf16(const uint16_t* data) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static Vec load_f16(const uint16_t* data) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
    }
    static Vec fill(float value) { return _mm256_set1_ps(value); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static float reduce_max(Vec a) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    static float reduce_add(Vec a) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    static Nan no_nan() { return _mm256_setzero_ps(); }
    // One unordered comparison looks at two vectors.
    static Nan note_nan(Nan seen, Vec a, Vec b) {
        return _mm256_or_ps(seen, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
    }
    static bool any_nan(Nan seen) { return _mm256_movemask_ps(seen) != 0; }
    static uint32_t nan_bits(Vec a) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
    }
    static uint32_t at_least_bits(Vec a, float threshold) {
        return static_cast<uint32_t>(
            _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_set1_ps(threshold), _CMP_GE_OQ)));
    }

    static void store(float* data, Vec a) { _mm256_storeu_ps(data, a); }
    static Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
    static Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
    static Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
    static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
    static Vec absolute(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    // Whether a lane lies above the bound or is NaN.
    static bool exceeds(Vec a, float bound) {
        return _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_set1_ps(bound), _CMP_NLE_UQ)) != 0;
    }
    static Ints fill_ints(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
    static Ints count_from(uint32_t first) {
        return _mm256_add_epi32(fill_ints(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static Ints subtract_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
    static Ints xor_ints(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
    template <int kBits>
    static Ints arithmetic_right(Ints a) {
        return _mm256_srai_epi32(a, kBits);
    }
    template <int kBits>
    static Ints left(Ints a) {
        return _mm256_slli_epi32(a, kBits);
    }
    static Vec to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
    static Ints as_ints(Vec a) { return _mm256_castps_si256(a); }
    static Vec as_floats(Ints a) { return _mm256_castsi256_ps(a); }
    static Vec select_negative(Ints sign, Vec a, Vec b) {
        return _mm256_blendv_ps(b, a, as_floats(sign));
    }
    static Vec select_zero(Ints zero, Vec a, Vec b) {
        return _mm256_blendv_ps(b, a, as_floats(_mm256_cmpeq_epi32(zero, _mm256_setzero_si256())));
    }
    // 32 x 32 -> 64 bits, unsigned: the even lanes and the odd ones each give four products.
    static void multiply_wide(Ints a, uint32_t factor, Ints& high, Ints& low) {
        const Ints b = fill_ints(factor);
        const Ints even = _mm256_mul_epu32(a, b);
        const Ints odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
        high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
        low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    }

    static Keys load_keys(const uint16_t* data) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
        const __m256i lower =
            _mm256_and_si256(_mm256_srai_epi16(bits, 15), _mm256_set1_epi16(0x7fff));
        return _mm256_xor_si256(bits, lower);
    }
    static Keys fill_keys(int16_t key) { return _mm256_set1_epi16(key); }
    static Keys max_keys(Keys a, Keys b) { return _mm256_max_epi16(a, b); }
    static Keys min_keys(Keys a, Keys b) { return _mm256_min_epi16(a, b); }
    static int16_t reduce_max_keys(Keys a) {
        alignas(32) int16_t keys[kKeyWidth];
        _mm256_store_si256(reinterpret_cast<__m256i*>(keys), a);
        int16_t best = keys[0];
        for (int16_t key : keys) best = key > best ? key : best;
        return best;
    }
    static int16_t reduce_min_keys(Keys a) {
        alignas(32) int16_t keys[kKeyWidth];
        _mm256_store_si256(reinterpret_cast<__m256i*>(keys), a);
        int16_t best = keys[0];
        for (int16_t key : keys) best = key < best ? key : best;
        return best;
    }
    static bool equals_any(const uint16_t* data, uint16_t pattern) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
        const __m256i wanted = _mm256_set1_epi16(static_cast<int16_t>(pattern));
        return _mm256_movemask_epi8(_mm256_cmpeq_epi16(bits, wanted)) != 0;
    }
};

#include "argmax_body.h"
#include "noise_body.h"
#include "perturbed_body.h"

}  // namespace

const ArgmaxKernels kArgmaxAvx2{span, largest, first_at_least, dot, perturbed, noise_row};

}  // namespace cllm
#endif
