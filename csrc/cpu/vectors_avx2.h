// fp32 vectors of AVX2; included inside an anonymous namespace, behind immintrin.h.

struct Simd {
    using Vec = __m256;
    static constexpr int64_t kWidth = 8;

    static Vec load(const float* data) { return _mm256_loadu_ps(data); }
    static Vec load_bf16(const uint16_t* data) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static Vec load_f16(const uint16_t* data) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
    }
    // In a register: gcc would read a vector from memory for each of its uses.
    static Vec held(Vec x) {
        asm("" : "+x"(x));
        return x;
    }
    static void store(float* data, Vec x) { _mm256_storeu_ps(data, x); }
    static void store_bf16(uint16_t* data, Vec x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i nearest =
            _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i kept = _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc00000), nan);
        const __m256i high = _mm256_srli_epi32(kept, 16);
        const __m128i packed =
            _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(data), packed);
    }
    static void store_f16(uint16_t* data, Vec x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(data),
                         _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static Vec fill(float value) { return _mm256_set1_ps(value); }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
    static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    // b where one of them is NaN
    static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
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
    // out [kCount]: the sum of each vector.
    template <int kCount>
    static void reduce_add_each(const Vec* vectors, float* out) {
        for (int i = 0; i < kCount; ++i) out[i] = reduce_add(vectors[i]);
    }
    static Vec round(Vec a) {
        return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static Vec copy_sign(Vec size, Vec sign) {
        return _mm256_or_ps(size, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign));
    }
    // x * 2^n, n whole and 2^n a normal number
    static Vec scale(Vec x, Vec n) {
        const __m256i power =
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
    }
    // x = mantissa * 2^exponent, mantissa between sqrt(1/2) and sqrt(2)
    static void split(Vec x, Vec& exponent, Vec& mantissa) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i whole =
            _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
        exponent = _mm256_cvtepi32_ps(whole);
        mantissa = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(whole, 23)));
    }
    static Vec zero_if_below(Vec value, Vec x, float bound) {
        return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_LT_OQ), value);
    }
    static Vec zero_unless(Vec condition, Vec value) {
        return _mm256_and_ps(_mm256_cmp_ps(condition, _mm256_setzero_ps(), _CMP_NEQ_UQ), value);
    }
    static Vec select_below(Vec x, float bound, Vec below, Vec otherwise) {
        return _mm256_blendv_ps(otherwise, below,
                                _mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_LT_OQ));
    }
};
