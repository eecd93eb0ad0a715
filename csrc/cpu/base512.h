// What the AVX-512 vectors of several kernels share; included inside an anonymous namespace, behind
// immintrin.h.
#pragma once

struct Base512 {
    using Vec = __m512;

    // In a register: gcc would read a vector from memory for each of its uses.
    template <typename Data>
    static Data held(Data x) {
        asm("" : "+v"(x));
        return x;
    }
    static float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
    // out [kCount]: the sum of each vector, to the bit what reduce_add gives, by a third of its
    // instructions where there are many.
    template <int kCount>
    static void reduce_add_each(const Vec* vectors, float* out) {
        constexpr int kTaken = kCount >= 16 ? 16 : kCount >= 8 ? 8 : kCount >= 4 ? 4 : 0;
        if constexpr (kTaken == 0) {
            for (int i = 0; i < kCount; ++i) out[i] = reduce_add(vectors[i]);
        } else {
            // the sums of quarter q are those of vectors kEach * q + 0 .. kEach - 1
            constexpr int kEach = kTaken / 4;
            Vec part[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                part[i] = quarters(vectors, i % kEach, kEach);
            }
            const Vec low = pairs(part[0], part[1 % kEach]);
            const Vec high = kEach == 4 ? pairs(part[2 % kEach], part[3 % kEach]) : low;
            const Vec sums = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88),
                                           _mm512_shuffle_ps(low, high, 0xdd));
            if constexpr (kEach == 4) {
                _mm512_storeu_ps(out, sums);
            } else {
                alignas(64) float all[16];
                _mm512_store_ps(all, sums);
                for (int i = 0; i < kTaken; ++i) out[i] = all[i / kEach * 4 + i % kEach];
            }
            if constexpr (kCount > kTaken) {
                reduce_add_each<kCount - kTaken>(vectors + kTaken, out + kTaken);
            }
        }
    }
    // Every quarter is one vector's: element i + 4 and so on added to element i. What two vectors
    // give to a sum is half of each as it lies, by a mask, and the other halves by one shuffle.
    static Vec quarters(const Vec* vectors, int first, int stride) {
        const auto halves = [](Vec a, Vec b) {
            return _mm512_add_ps(_mm512_mask_mov_ps(a, 0xff00, b),
                                 _mm512_shuffle_f32x4(a, b, 0x4e));
        };
        const Vec even = halves(vectors[first], vectors[first + 2 * stride]);
        const Vec odd = halves(vectors[first + stride], vectors[first + 3 * stride]);
        const __m512i others =
            _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
        return _mm512_add_ps(_mm512_mask_mov_ps(even, 0xf0f0, odd),
                             _mm512_permutex2var_ps(even, others, odd));
    }
    // In every quarter a's two sums of elements two apart, then b's.
    static Vec pairs(Vec a, Vec b) {
        const __m512d others =
            _mm512_shuffle_pd(_mm512_castps_pd(a), _mm512_castps_pd(b), 0b01010101);
        return _mm512_add_ps(_mm512_mask_mov_ps(a, 0xcccc, b), _mm512_castpd_ps(others));
    }
};
