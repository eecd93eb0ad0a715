// Any CPU: short arrays that the compiler turns into whatever vectors the baseline offers.
#include "consistency.h"

namespace cllm {
namespace {

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
    static float from_bits(uint32_t bits) {
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    }
    static uint32_t to_bits(float value) {
        uint32_t bits;
        __builtin_memcpy(&bits, &value, sizeof bits);
        return bits;
    }
    static float from_f16(uint16_t bits) {
        const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
        const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
        if (exponent == 0x1f) return from_bits(sign | 0x7f800000u | (mantissa << 13));
        if (exponent == 0) {
            // Subnormal: mantissa * 2^-24 is exact in fp32.
            const float size = float(mantissa) * 5.9604644775390625e-8f;
            return sign ? -size : size;
        }
        return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
    }
    static uint16_t to_f16(float x) {
        const uint32_t sign = (to_bits(x) >> 16) & 0x8000u;
        const float size = __builtin_fabsf(x);
        if (size != size) return uint16_t(sign | 0x7e00u);
        if (size >= 65520.0f) return uint16_t(sign | 0x7c00u);
        // Adding a power of two that leaves 10 bits behind the point (24 below fp16's normal range)
        // rounds to nearest, ties to even, as fp32 addition does.
        if (size < 6.103515625e-5f) {
            return uint16_t(sign | (to_bits(size + 0.5f) - to_bits(0.5f)));
        }
        const uint32_t bits = to_bits(size);
        const uint32_t nearest = bits + 0xfffu + ((bits >> 13) & 1u);
        return uint16_t(sign | ((nearest - (112u << 23)) >> 13));
    }
    static uint16_t to_bf16(float x) {
        const uint32_t bits = to_bits(x);
        if (x != x) return 0x7fc0;
        return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }

    static Vec load(const float* data) {
        return each([&](int64_t i) { return data[i]; });
    }
    static Vec load_bf16(const uint16_t* data) {
        return each([&](int64_t i) { return from_bits(uint32_t(data[i]) << 16); });
    }
    static Vec load_f16(const uint16_t* data) {
        return each([&](int64_t i) { return from_f16(data[i]); });
    }
    static void store(float* data, const Vec& x) { __builtin_memcpy(data, x.lane, sizeof x.lane); }
    static void store_bf16(uint16_t* data, const Vec& x) {
        for (int64_t i = 0; i < kWidth; ++i) data[i] = to_bf16(x.lane[i]);
    }
    static void store_f16(uint16_t* data, const Vec& x) {
        for (int64_t i = 0; i < kWidth; ++i) data[i] = to_f16(x.lane[i]);
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
            return x.lane[i] * from_bits(uint32_t(power) << 23);
        });
    }
    // x = mantissa * 2^exponent, mantissa between sqrt(1/2) and sqrt(2)
    static void split(const Vec& x, Vec& exponent, Vec& mantissa) {
        for (int64_t i = 0; i < kWidth; ++i) {
            const int32_t bits = int32_t(to_bits(x.lane[i]));
            const int32_t whole = (bits - 0x3f3504f3) >> 23;
            exponent.lane[i] = float(whole);
            mantissa.lane[i] = from_bits(uint32_t(bits) - (uint32_t(whole) << 23));
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

#include "consistency_body.h"

}  // namespace

const ConsistencyRow kConsistencyRowScalar = &consistency_row;

}  // namespace cllm
