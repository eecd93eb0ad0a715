// The vectors of block_linear's two AVX-512 units; included inside an anonymous namespace, behind
// immintrin.h.

#include "base512.h"

struct Simd : Base512 {
    using Vec = __m512;
    static constexpr int64_t kWidth = 16;
    static constexpr int kAccumulators = 24;  // of 32 registers

    static Vec load(const float* data) { return _mm512_loadu_ps(data); }
    static Vec load_bf16(const uint16_t* data) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static Vec load_f16(const uint16_t* data) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
    }
    // The first `count` of a vector, fewer than all, and zeros.
    static Vec load_some(const float* data, int64_t count) {
        return _mm512_maskz_loadu_ps(first(count), data);
    }
    static Vec load_some_bf16(const uint16_t* data, int64_t count) {
        const __m256i bits = _mm256_maskz_loadu_epi16(first(count), data);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static Vec load_some_f16(const uint16_t* data, int64_t count) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), data));
    }
    static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
    // narrow_bf16 of each.
    static void narrow_four(const float* data, uint16_t* out) {
        const __m128 x = _mm_loadu_ps(data);
        const __m128i bits = _mm_castps_si128(x);
        const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
        const __m128i half = _mm_add_epi32(odd, _mm_set1_epi32(0x7fff));
        const __m128i nearest = _mm_srli_epi32(_mm_add_epi32(bits, half), 16);
        const __m128i narrow = _mm_mask_mov_epi32(nearest, _mm_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                                  _mm_set1_epi32(0x7fc0));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(narrow, narrow));
    }
    static void store(float* data, Vec x) { _mm512_storeu_ps(data, x); }
    static Vec fill(float value) { return _mm512_set1_ps(value); }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    // Into L2: a line that is asked for into L1 holds up the loads of others while it comes.
    // always_inline: gcc takes a function that only prefetches for one that does nothing.
    __attribute__((always_inline)) static void prefetch(const void* place) {
        _mm_prefetch(static_cast<const char*>(place), _MM_HINT_T1);
    }
};
