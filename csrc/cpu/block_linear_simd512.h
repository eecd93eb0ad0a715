// The vectors of block_linear's two AVX-512 units; included inside an anonymous namespace, behind
// immintrin.h.

struct Simd {
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
    static void store(float* data, Vec x) { _mm512_storeu_ps(data, x); }
    static Vec fill(float value) { return _mm512_set1_ps(value); }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
    // Into L2: a line that is asked for into L1 holds up the loads of others while it comes.
    static void prefetch(const void* place) {
        _mm_prefetch(static_cast<const char*>(place), _MM_HINT_T1);
    }
};
