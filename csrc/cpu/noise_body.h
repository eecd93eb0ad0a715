// Gumbel noise over a vector type; cllm_kernels/gumbel_noise/reference.py is the definition, and
// every operation here stands in its order there, so that all backends give the same bits. Included
// after `Simd` and inside the same anonymous namespace as argmax_body.h.

constexpr int64_t kNoiseBlock = 64;  // vocabulary entries that 16 Philox calls serve

// Philox4x32-10 (Salmon et al. 2011): word 0 of the counter differs from lane to lane.
inline void philox(Simd::Ints word0, const NoiseKey& key, Simd::Ints out[4]) {
    Simd::Ints a = word0, b = Simd::fill_ints(key.row);
    Simd::Ints c = Simd::fill_ints(key.position[0]), d = Simd::fill_ints(key.position[1]);
    uint32_t key0 = key.seed[0], key1 = key.seed[1];
    for (int round = 0; round < 10; ++round) {
        Simd::Ints high_a, low_a, high_c, low_c;
        Simd::multiply_wide(a, 0xD2511F53u, high_a, low_a);
        Simd::multiply_wide(c, 0xCD9E8D57u, high_c, low_c);
        a = Simd::xor_ints(Simd::xor_ints(high_c, b), Simd::fill_ints(key0));
        b = low_c;
        c = Simd::xor_ints(Simd::xor_ints(high_a, d), Simd::fill_ints(key1));
        d = low_a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
}

// The steps below take the four words of a Philox call side by side: each is a chain of dependent
// operations, and four chains keep the units busy that one leaves idle.
struct Quad {
    Simd::Vec part[4];
};

template <typename F>
inline Quad quad(F f) {
    return {{f(0), f(1), f(2), f(3)}};
}

// exponent * log 2 + log(1 + f), where log(1 + f) = f + f^2 Q(f)
inline Quad log_of(const Quad& exponent, const Quad& f) {
    constexpr float kQ[8] = {0.08734846115112305f,  -0.14307524263858795f, 0.14917974174022675f,
                             -0.16570508480072021f, 0.19962072372436523f,  -0.25001755356788635f,
                             0.33333951234817505f,  -0.49999991059303284f};
    Quad q = quad([&](int) { return Simd::fill(kQ[0]); });
    for (int i = 1; i < 8; ++i) {
        q = quad([&](int j) {
            return Simd::add(Simd::multiply(q.part[j], f.part[j]), Simd::fill(kQ[i]));
        });
    }
    return quad([&](int j) {
        const Simd::Vec e = exponent.part[j], x = f.part[j];
        const Simd::Vec tail = Simd::add(Simd::multiply(e, Simd::fill(1.42860677e-06f)),
                                         Simd::multiply(Simd::multiply(x, x), q.part[j]));
        return Simd::add(Simd::multiply(e, Simd::fill(0.693145751953125f)), Simd::add(x, tail));
    });
}

// x = 2^exponent * mantissa, mantissa in [sqrt(1/2), sqrt(2)).
inline Simd::Ints exponent_of(Simd::Vec x) {
    const Simd::Ints bits = Simd::as_ints(x);
    return Simd::arithmetic_right<23>(Simd::subtract_ints(bits, Simd::fill_ints(0x3f3504f3u)));
}
inline Simd::Vec mantissa_of(Simd::Vec x, Simd::Ints exponent) {
    return Simd::as_floats(Simd::subtract_ints(Simd::as_ints(x), Simd::left<23>(exponent)));
}

// -log(-log(1 - w)) with w = (word + 1/2) 2^-32.
inline Quad gumbel(const Simd::Ints word[4]) {
    const Simd::Vec zero = Simd::fill(0.0f), one = Simd::fill(1.0f);
    // t = min(w, 1 - w), so that both ends keep their relative precision.
    const Quad t = quad([&](int j) {
        const Simd::Ints folded = Simd::xor_ints(word[j], Simd::arithmetic_right<31>(word[j]));
        return Simd::multiply(Simd::add(Simd::to_float(folded), Simd::fill(0.5f)),
                              Simd::fill(2.3283064365386963e-10f));
    });
    Quad exponent, f;
    for (int j = 0; j < 4; ++j) {
        const Simd::Vec x =
            Simd::select_negative(word[j], t.part[j], Simd::subtract(one, t.part[j]));
        const Simd::Ints e = exponent_of(x);
        exponent.part[j] = Simd::to_float(e);
        // Near w = 0, 1 - t has lost what t still holds.
        f.part[j] = Simd::select_zero(e, Simd::subtract(zero, t.part[j]),
                                      Simd::subtract(mantissa_of(x, e), one));
    }
    const Quad inner = log_of(exponent, f);
    for (int j = 0; j < 4; ++j) {
        const Simd::Vec x = Simd::subtract(zero, inner.part[j]);
        const Simd::Ints e = exponent_of(x);
        exponent.part[j] = Simd::to_float(e);
        f.part[j] = Simd::subtract(mantissa_of(x, e), one);
    }
    const Quad outer = log_of(exponent, f);
    return quad([&](int j) { return Simd::subtract(zero, outer.part[j]); });
}

// The noise of vocabulary entries 64 * block .. 64 * block + 63.
void gumbel_block(const NoiseKey& key, uint32_t block, float* out) {
    for (int64_t lane = 0; lane < 16; lane += Simd::kWidth) {
        Simd::Ints words[4];
        philox(Simd::count_from(16u * block + static_cast<uint32_t>(lane)), key, words);
        const Quad noise = gumbel(words);
        for (int64_t j = 0; j < 4; ++j) Simd::store(out + 16 * j + lane, noise.part[j]);
    }
}
