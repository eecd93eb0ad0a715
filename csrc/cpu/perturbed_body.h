// One row of scores with its noise, folded into the running winner. Included after noise_body.h and
// argmax_body.h, inside the same anonymous namespace.

// exp(y) for y in [-20, 0].
inline Simd::Vec exp_of(Simd::Vec y) {
    const Simd::Vec magic = Simd::fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Simd::Vec rounded = Simd::add(Simd::multiply(y, Simd::fill(1.44269504f)), magic);
    const Simd::Vec n = Simd::subtract(rounded, magic);
    Simd::Vec r = Simd::subtract(y, Simd::multiply(n, Simd::fill(0.693145751953125f)));
    r = Simd::subtract(r, Simd::multiply(n, Simd::fill(1.42860677e-06f)));
    constexpr float kTaylor[8] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24,
                                  1.0f / 6,    0.5f,       1.0f,       1.0f};
    Simd::Vec p = Simd::fill(kTaylor[0]);
    for (int i = 1; i < 8; ++i) p = Simd::add(Simd::multiply(p, r), Simd::fill(kTaylor[i]));
    const Simd::Ints power = Simd::add_ints(
        Simd::subtract_ints(Simd::as_ints(rounded), Simd::as_ints(magic)), Simd::fill_ints(127u));
    return Simd::multiply(p, Simd::as_floats(Simd::left<23>(power)));
}

inline Simd::Vec tanh_of(Simd::Vec x) {
    const Simd::Vec one = Simd::fill(1.0f);
    // min() hands on its second operand where one is NaN; beyond 10 tanh is 1 in fp32.
    const Simd::Vec magnitude = Simd::min(Simd::fill(10.0f), Simd::absolute(x));
    const Simd::Vec t = exp_of(Simd::multiply(magnitude, Simd::fill(-2.0f)));
    const Simd::Vec positive = Simd::divide(Simd::subtract(one, t), Simd::add(one, t));
    const Simd::Vec large = Simd::select_negative(
        Simd::as_ints(x), Simd::subtract(Simd::fill(0.0f), positive), positive);
    // Near 0 the Taylor series: (1 - t) / (1 + t) would cancel.
    const Simd::Vec square = Simd::multiply(x, x);
    constexpr float kSeries[4] = {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3};
    Simd::Vec series = Simd::fill(kSeries[0]);
    for (int i = 1; i < 4; ++i) {
        series = Simd::add(Simd::multiply(series, square), Simd::fill(kSeries[i]));
    }
    const Simd::Vec small = Simd::add(x, Simd::multiply(Simd::multiply(x, square), series));
    const Simd::Vec beyond = Simd::subtract(magnitude, Simd::fill(0.25f));
    return Simd::select_negative(Simd::as_ints(beyond), small, large);
}

inline Simd::Vec perturb(Simd::Vec x, Simd::Vec noise, float softcap, float scale) {
    if (softcap > 0.0f) {
        const Simd::Vec cap = Simd::fill(softcap);
        x = Simd::multiply(cap, tanh_of(Simd::divide(x, cap)));
    }
    return Simd::add(Simd::multiply(x, Simd::fill(scale)), noise);
}

inline float perturb_one(float x, float noise, const PerturbedRow& row) {
    float lanes[Simd::kWidth];
    Simd::store(lanes, perturb(Simd::fill(x), Simd::fill(noise), row.softcap, row.scale));
    return lanes[0];
}

// The most that a score can have been before it was rounded to the 16 bits of x: half a unit in the
// last place more, 2^-8 (bf16) or 2^-11 (fp16) of it, or 2^-25 where fp16 is subnormal. What
// overflowed to -inf may have been as high as the lowest finite number.
struct Unrounded {
    Simd::Vec unit, lowest;
    explicit Unrounded(Dtype dtype)
        : unit(Simd::fill(dtype == Dtype::kBFloat16 ? 0.00390625f : 0.00048828125f)),
          lowest(Simd::fill(dtype == Dtype::kBFloat16 ? -3.3895314e38f : -65504.0f)) {}
    Simd::Vec operator()(Simd::Vec x) const {
        const Simd::Vec finite = Simd::max(lowest, x);  // hands on a NaN of x
        const Simd::Vec reach = Simd::add(Simd::multiply(Simd::absolute(finite), unit),
                                          Simd::fill(5.9604644775390625e-8f));
        return Simd::add(finite, reach);
    }
};

template <typename Type>
void perturbed_of(const PerturbedRow& row, int64_t* index, float* value) {
    const auto* data = static_cast<const typename Type::Element*>(row.scores.data);
    const float* bias = row.scores.bias;
    const int64_t count = row.scores.count;
    const bool exact = row.hidden != nullptr;
    const Unrounded unrounded(row.scores.dtype);
    // tanh as computed may fall by its rounding error where it should rise.
    const float slack = row.softcap > 0.0f ? 2e-6f * row.softcap * row.scale : 0.0f;
    if (*index < 0) {
        *index = row.first;
        *value = -__builtin_inff();
    }
    float best = *value;
    if (best != best) return;
    for (int64_t begin = 0; begin < count; begin += kNoiseBlock) {
        float noise[kNoiseBlock], bound[kNoiseBlock], padded_bias[kNoiseBlock];
        typename Type::Element padded[kNoiseBlock];
        const typename Type::Element* x = data + begin;
        const float* shift = bias == nullptr ? nullptr : bias + begin;
        const int64_t real = count - begin < kNoiseBlock ? count - begin : kNoiseBlock;
        if (real < kNoiseBlock) {
            for (int64_t i = 0; i < kNoiseBlock; ++i) {
                padded[i] = i < real ? x[i] : typename Type::Element(0);
                padded_bias[i] = i < real && shift != nullptr ? shift[i] : 0.0f;
            }
            x = padded;
            shift = shift == nullptr ? nullptr : padded_bias;
        }
        gumbel_block(row.key, static_cast<uint32_t>((row.first + begin) / kNoiseBlock), noise);
        bool hit = false;
        for (int64_t i = 0; i < kNoiseBlock; i += Simd::kWidth) {
            Simd::Vec score = Type::vector(x + i);
            if (exact) score = unrounded(score);
            if (shift != nullptr) score = Simd::add(score, Simd::load(shift + i));
            score = perturb(score, Simd::load(noise + i), row.softcap, row.scale);
            if (exact) score = Simd::add(score, Simd::fill(slack));
            Simd::store(bound + i, score);
            hit |= Simd::exceeds(score, best);
        }
        if (!hit) continue;
        for (int64_t i = 0; i < real; ++i) {
            if (bound[i] <= best) continue;
            float score = bound[i];
            if (exact) {
                const char* weight = static_cast<const char*>(row.operands->weight) +
                                     (begin + i) * row.operands->weight_stride * 2;
                score = dot(row.hidden, weight, row.scores.dtype, row.operands->width);
                if (shift != nullptr) score += shift[i];
                score = perturb_one(score, noise[i], row);
            }
            if (score <= best) continue;
            best = score;
            *index = row.first + begin + i;
            *value = score;
            if (score != score) return;
        }
    }
}

void perturbed(const PerturbedRow& row, int64_t* index, float* value) {
    switch (row.scores.dtype) {
        case Dtype::kFloat32:
            return perturbed_of<Float32>(row, index, value);
        case Dtype::kBFloat16:
            return perturbed_of<BFloat16>(row, index, value);
        default:
            return perturbed_of<Float16>(row, index, value);
    }
}

// out [count]: the noise of vocabulary entries first .. first + count - 1; 64 divides first.
void noise_row(const NoiseKey& key, int64_t first, int64_t count, float* out) {
    for (int64_t begin = 0; begin < count; begin += kNoiseBlock) {
        const uint32_t block = static_cast<uint32_t>((first + begin) / kNoiseBlock);
        if (count - begin >= kNoiseBlock) {
            gumbel_block(key, block, out + begin);
            continue;
        }
        float last[kNoiseBlock];
        gumbel_block(key, block, last);
        for (int64_t i = begin; i < count; ++i) out[i] = last[i - begin];
    }
}
