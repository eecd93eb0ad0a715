// Any CPU: short arrays that the compiler turns into whatever vectors the baseline offers.
#include "argmax.h"

namespace cllm {
namespace {

#include "half.h"

struct Simd {
    static constexpr int64_t kWidth = 8;
    static constexpr int64_t kKeyWidth = 16;
    struct Vec {
        float lane[kWidth];
    };
    struct Ints {
        uint32_t lane[kWidth];
    };
    using Nan = uint32_t;
    struct Keys {
        int16_t lane[kKeyWidth];
    };

    template <typename F>
    static Vec each(F f) {
        Vec out;
        for (int64_t i = 0; i < kWidth; ++i) out.lane[i] = f(i);
        return out;
    }
    template <typename F>
    static uint32_t bits(F f) {
        uint32_t out = 0;
        for (int64_t i = 0; i < kWidth; ++i) out |= uint32_t(f(i)) << i;
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
    static Vec fill(float value) {
        return each([&](int64_t) { return value; });
    }
    static Vec add(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
    }
    static Vec max(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
        return each([&](int64_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static float reduce_max(const Vec& a) {
        float best = a.lane[0];
        for (float value : a.lane) best = value > best ? value : best;
        return best;
    }
    static float reduce_add(const Vec& a) {
        float sum = 0.0f;
        for (float value : a.lane) sum += value;
        return sum;
    }
    static Nan no_nan() { return 0; }
    static Nan note_nan(Nan seen, const Vec& a, const Vec& b) {
        uint32_t found = 0;
        for (int64_t i = 0; i < kWidth; ++i) {
            found |= uint32_t(a.lane[i] != a.lane[i]) | uint32_t(b.lane[i] != b.lane[i]);
        }
        return seen | found;
    }
    static bool any_nan(Nan seen) { return seen != 0; }
    static uint32_t nan_bits(const Vec& a) {
        return bits([&](int64_t i) { return a.lane[i] != a.lane[i]; });
    }
    static uint32_t at_least_bits(const Vec& a, float threshold) {
        return bits([&](int64_t i) { return a.lane[i] >= threshold; });
    }

    template <typename F>
    static Ints each_int(F f) {
        Ints out;
        for (int64_t i = 0; i < kWidth; ++i) out.lane[i] = f(i);
        return out;
    }
    static void store(float* data, const Vec& a) {
        for (int64_t i = 0; i < kWidth; ++i) data[i] = a.lane[i];
    }
    static Vec subtract(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] - b.lane[i]; });
    }
    static Vec multiply(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
    }
    static Vec divide(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] / b.lane[i]; });
    }
    static Vec min(const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static Vec absolute(const Vec& a) {
        return each([&](int64_t i) { return __builtin_fabsf(a.lane[i]); });
    }
    // Whether a lane lies above the bound or is NaN.
    static bool exceeds(const Vec& a, float bound) {
        bool found = false;
        for (float lane : a.lane) found |= !(lane <= bound);
        return found;
    }
    static Ints fill_ints(uint32_t value) {
        return each_int([&](int64_t) { return value; });
    }
    static Ints count_from(uint32_t first) {
        return each_int([&](int64_t i) { return first + static_cast<uint32_t>(i); });
    }
    static Ints add_ints(const Ints& a, const Ints& b) {
        return each_int([&](int64_t i) { return a.lane[i] + b.lane[i]; });
    }
    static Ints subtract_ints(const Ints& a, const Ints& b) {
        return each_int([&](int64_t i) { return a.lane[i] - b.lane[i]; });
    }
    static Ints xor_ints(const Ints& a, const Ints& b) {
        return each_int([&](int64_t i) { return a.lane[i] ^ b.lane[i]; });
    }
    template <int kBits>
    static Ints arithmetic_right(const Ints& a) {
        return each_int([&](int64_t i) {
            return static_cast<uint32_t>(static_cast<int32_t>(a.lane[i]) >> kBits);
        });
    }
    template <int kBits>
    static Ints left(const Ints& a) {
        return each_int([&](int64_t i) { return a.lane[i] << kBits; });
    }
    static Vec to_float(const Ints& a) {
        return each([&](int64_t i) { return static_cast<float>(static_cast<int32_t>(a.lane[i])); });
    }
    static Ints as_ints(const Vec& a) {
        Ints out;
        __builtin_memcpy(&out, &a, sizeof out);
        return out;
    }
    static Vec as_floats(const Ints& a) {
        Vec out;
        __builtin_memcpy(&out, &a, sizeof out);
        return out;
    }
    static Vec select_negative(const Ints& sign, const Vec& a, const Vec& b) {
        return each([&](int64_t i) {
            return static_cast<int32_t>(sign.lane[i]) < 0 ? a.lane[i] : b.lane[i];
        });
    }
    static Vec select_zero(const Ints& zero, const Vec& a, const Vec& b) {
        return each([&](int64_t i) { return zero.lane[i] == 0 ? a.lane[i] : b.lane[i]; });
    }
    // 32 x 32 -> 64 bits, unsigned.
    static void multiply_wide(const Ints& a, uint32_t factor, Ints& high, Ints& low) {
        for (int64_t i = 0; i < kWidth; ++i) {
            const uint64_t product = static_cast<uint64_t>(a.lane[i]) * factor;
            high.lane[i] = static_cast<uint32_t>(product >> 32);
            low.lane[i] = static_cast<uint32_t>(product);
        }
    }

    static Keys load_keys(const uint16_t* data) {
        Keys out;
        for (int64_t i = 0; i < kKeyWidth; ++i) {
            const int16_t bits = static_cast<int16_t>(data[i]);
            out.lane[i] = static_cast<int16_t>(bits ^ ((bits >> 15) & 0x7fff));
        }
        return out;
    }
    static Keys fill_keys(int16_t key) {
        Keys out;
        for (int16_t& lane : out.lane) lane = key;
        return out;
    }
    static Keys max_keys(Keys a, const Keys& b) {
        for (int64_t i = 0; i < kKeyWidth; ++i) {
            a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
        }
        return a;
    }
    static Keys min_keys(Keys a, const Keys& b) {
        for (int64_t i = 0; i < kKeyWidth; ++i) {
            a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
        }
        return a;
    }
    static int16_t reduce_max_keys(const Keys& a) {
        int16_t best = a.lane[0];
        for (int16_t key : a.lane) best = key > best ? key : best;
        return best;
    }
    static int16_t reduce_min_keys(const Keys& a) {
        int16_t best = a.lane[0];
        for (int16_t key : a.lane) best = key < best ? key : best;
        return best;
    }
    static bool equals_any(const uint16_t* data, uint16_t pattern) {
        bool found = false;
        for (int64_t i = 0; i < kKeyWidth; ++i) found |= data[i] == pattern;
        return found;
    }
};

#include "argmax_body.h"
#include "noise_body.h"
#include "perturbed_body.h"

}  // namespace

const ArgmaxKernels kArgmaxScalar{span, largest, first_at_least, dot, perturbed, noise_row};

}  // namespace cllm
