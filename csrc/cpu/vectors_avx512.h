// fp32 vectors of AVX-512; included inside an anonymous namespace, behind immintrin.h.

#include "base512.h"

struct Simd : Base512 {
    using Vec = __m512;
    static constexpr int64_t kWidth = 16;

    static Vec load(const float* data) { return _mm512_loadu_ps(data); }
    static Vec load_bf16(const uint16_t* data) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static Vec load_f16(const uint16_t* data) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
    }
    static void store(float* data, Vec x) { _mm512_storeu_ps(data, x); }
    static void store_bf16(uint16_t* data, Vec x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i nearest =
            _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_mov_epi32(nearest, nan, _mm512_set1_epi32(0x7fc00000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(data),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
    }
    static void store_f16(uint16_t* data, Vec x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(data),
                            _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static Vec fill(float value) { return _mm512_set1_ps(value); }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    // b where one of them is NaN
    static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    static float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
    static Vec round(Vec a) {
        return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static Vec abs(Vec a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
    static Vec copy_sign(Vec size, Vec sign) {
        return _mm512_or_ps(size, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign));
    }
    // x * 2^n, n whole and 2^n a normal number
    static Vec scale(Vec x, Vec n) {
        const __m512i power =
            _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
        return _mm512_mul_ps(x, _mm512_castsi512_ps(power));
    }
    // x = mantissa * 2^exponent, mantissa between sqrt(1/2) and sqrt(2)
    static void split(Vec x, Vec& exponent, Vec& mantissa) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i whole =
            _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
        exponent = _mm512_cvtepi32_ps(whole);
        mantissa = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(whole, 23)));
    }
    static Vec zero_if_below(Vec value, Vec x, float bound) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_NLT_UQ),
                                   value);
    }
    static Vec zero_unless(Vec condition, Vec value) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, _mm512_setzero_ps(), _CMP_NEQ_UQ),
                                   value);
    }
    static Vec select_below(Vec x, float bound, Vec below, Vec otherwise) {
        return _mm512_mask_mov_ps(otherwise,
                                  _mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_LT_OQ), below);
    }
};
