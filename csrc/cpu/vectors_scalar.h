// fp32 vectors of any CPU: short arrays that the compiler turns into whatever the baseline offers.
// Included inside an anonymous namespace, behind half.h.

struct Simd {
    static constexpr int64_t kWidth = 8;
    struct Vec {
        float lane[kWidth];
    };

    template <typename F>
    static Vec each(F f) {
        Vec out;
        for (int64_t i = 0; i < kWidth; ++i) out.lane[i] = f(i);
        return out;
    }
    static Vec load(const float* data) {
        return each([&](int64_t i) { return data[i]; });
    }
    static Vec load_bf16(const uint16_t* data) {
        return each([&](int64_t i) { return widen_bf16(data[i]); });
    }
    static Vec load_f16(const uint16_t* data) {
        return each([&](int64_t i) { return widen_f16(data[i]); });
    }
    static Vec held(const Vec& x) { return x; }
    static void store(float* data, const Vec& x) { __builtin_memcpy(data, x.lane, sizeof x.lane); }
    static void store_bf16(uint16_t* data, const Vec& x) {
        for (int64_t i = 0; i < kWidth; ++i) data[i] = narrow_bf16(x.lane[i]);
    }
    static void store_f16(uint16_t* data, const Vec& x) {
        for (int64_t i = 0; i < kWidth; ++i) data[i] = narrow_f16(x.lane[i]);
    }
    static Vec fill(float value) {
        return each([&](int64_t) { return value; });
    }
    static Vec add(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
    }
    static Vec sub(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] - b.lane[i]; });
    }
    static Vec mul(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
    }
    static Vec div(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] / b.lane[i]; });
    }
    static Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
        return each([&](int64_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    // b where one of them is NaN
    static Vec max(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static float reduce_max(const Vec& a) {
        float best = a.lane[0];
        for (float x : a.lane) best = x > best ? x : best;
        return best;
    }
    static float reduce_add(const Vec& a) {
        float sum = 0.0f;
        for (float x : a.lane) sum += x;
        return sum;
    }
    // out [kCount]: the sum of each vector.
    template <int kCount>
    static void reduce_add_each(const Vec* vectors, float* out) {
        for (int i = 0; i < kCount; ++i) out[i] = reduce_add(vectors[i]);
    }
    // Adding 1.5 * 2^23 leaves no bits behind the point; whatever is larger is masked by the
    // caller.
    static Vec round(const Vec& a) {
        return each([&](int64_t i) { return (a.lane[i] + 12582912.0f) - 12582912.0f; });
    }
    static Vec abs(const Vec& a) {
        return each([&](int64_t i) { return __builtin_fabsf(a.lane[i]); });
    }
    static Vec copy_sign(const Vec& size, const Vec& sign) {
        return each([&](int64_t i) { return __builtin_copysignf(size.lane[i], sign.lane[i]); });
    }
    // x * 2^n, n whole and 2^n a normal number; any number where it is not
    static Vec scale(const Vec& x, const Vec& n) {
        return each([&](int64_t i) {
            const bool normal = n.lane[i] > -127.0f && n.lane[i] < 128.0f;
            const int32_t power = normal ? int32_t(n.lane[i]) + 127 : 127;
            return x.lane[i] * bits_to_float(uint32_t(power) << 23);
        });
    }
    // x = mantissa * 2^exponent, mantissa between sqrt(1/2) and sqrt(2)
    static void split(const Vec& x, Vec& exponent, Vec& mantissa) {
        for (int64_t i = 0; i < kWidth; ++i) {
            const int32_t bits = int32_t(float_to_bits(x.lane[i]));
            const int32_t whole = (bits - 0x3f3504f3) >> 23;
            exponent.lane[i] = float(whole);
            mantissa.lane[i] = bits_to_float(uint32_t(bits) - (uint32_t(whole) << 23));
        }
    }
    static Vec zero_if_below(const Vec& value, const Vec& x, float bound) {
        return each([&](int64_t i) { return x.lane[i] < bound ? 0.0f : value.lane[i]; });
    }
    static Vec zero_unless(const Vec& condition, const Vec& value) {
        return each([&](int64_t i) { return condition.lane[i] != 0.0f ? value.lane[i] : 0.0f; });
    }
    static Vec select_below(const Vec& x, float bound, const Vec& below, const Vec& otherwise) {
        return each(
            [&](int64_t i) { return x.lane[i] < bound ? below.lane[i] : otherwise.lane[i]; });
    }
};
