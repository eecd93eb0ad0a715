// The scans of argmax.h over a vector type. Each argmax_<isa>.cpp defines `Simd` and includes this,
// all inside an anonymous namespace: no function here may be shared between translation units that
// are compiled for different instruction sets, and for the same reason nothing of std is called.
//
// The hot loop only keeps a running maximum and whether a NaN passed by; the position is looked up
// afterwards in the one block that holds the winner. That is two or three instructions per vector,
// so a scan runs at the speed of the memory it reads.

constexpr int64_t kBlock = 2048;  // elements whose maximum is taken together; they fit in L1

#include "half.h"

struct Float32 {
    using Element = float;
    static float scalar(const float* data) { return *data; }
    static Simd::Vec vector(const float* data) { return Simd::load(data); }
};
struct BFloat16 {
    using Element = uint16_t;
    static float scalar(const uint16_t* data) { return widen_bf16(*data); }
    static Simd::Vec vector(const uint16_t* data) { return Simd::load_bf16(data); }
};
struct Float16 {
    using Element = uint16_t;
    static float scalar(const uint16_t* data) { return widen_f16(*data); }
    static Simd::Vec vector(const uint16_t* data) { return Simd::load_f16(data); }
};

// x[i] = data[i] + bias[i], or data[i]
template <typename Type, bool kBias>
struct Reader {
    const typename Type::Element* data;
    const float* bias;
    float scalar(int64_t i) const {
        const float x = Type::scalar(data + i);
        return kBias ? x + bias[i] : x;
    }
    Simd::Vec vector(int64_t i) const {
        const Simd::Vec x = Type::vector(data + i);
        return kBias ? Simd::add(x, Simd::load(bias + i)) : x;
    }
};

// Largest of x[begin, end), or NaN if one of them is.
template <typename R>
float block_max(const R& x, int64_t begin, int64_t end) {
    constexpr int64_t kWidth = Simd::kWidth;
    float best = -__builtin_inff();
    bool nan = false;
    int64_t i = begin;
    if (end - begin >= kWidth) {
        Simd::Vec a = Simd::fill(best), b = a, c = a, d = a;
        Simd::Nan seen = Simd::no_nan();
        for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
            const Simd::Vec p = x.vector(i), q = x.vector(i + kWidth);
            const Simd::Vec r = x.vector(i + 2 * kWidth), s = x.vector(i + 3 * kWidth);
            seen = Simd::note_nan(Simd::note_nan(seen, p, q), r, s);
            a = Simd::max(a, p);
            b = Simd::max(b, q);
            c = Simd::max(c, r);
            d = Simd::max(d, s);
        }
        for (; i + kWidth <= end; i += kWidth) {
            const Simd::Vec p = x.vector(i);
            seen = Simd::note_nan(seen, p, p);
            a = Simd::max(a, p);
        }
        nan = Simd::any_nan(seen);
        best = Simd::reduce_max(Simd::max(Simd::max(a, b), Simd::max(c, d)));
    }
    for (; i < end; ++i) {
        const float value = x.scalar(i);
        nan |= value != value;
        best = value > best ? value : best;
    }
    return nan ? __builtin_nanf("") : best;
}

// First i in [begin, end) with x[i] >= threshold, or that is NaN where threshold is; else end.
template <typename R>
int64_t find_first(const R& x, int64_t begin, int64_t end, float threshold) {
    const bool want_nan = threshold != threshold;
    int64_t i = begin;
    for (; i + Simd::kWidth <= end; i += Simd::kWidth) {
        const Simd::Vec value = x.vector(i);
        const uint32_t hit =
            want_nan ? Simd::nan_bits(value) : Simd::at_least_bits(value, threshold);
        if (hit != 0) return i + __builtin_ctz(hit);
    }
    for (; i < end; ++i) {
        const float value = x.scalar(i);
        if (want_nan ? value != value : value >= threshold) return i;
    }
    return end;
}

template <typename R>
Best span_of(const R& x, int64_t count) {
    Best best{-__builtin_inff(), 0};
    int64_t block = 0;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t end = begin + kBlock < count ? begin + kBlock : count;
        const float value = block_max(x, begin, end);
        if (value != value) return {value, find_first(x, begin, end, value)};
        if (value > best.value) {
            best.value = value;
            block = begin;
        }
    }
    best.index = find_first(x, block, count, best.value);
    return best;
}

// 16-bit floats without widening: flipping the lower bits of negative numbers makes their bit
// patterns, read as signed integers, ascend with their values. NaN lies outside [-inf, +inf].
inline int16_t ordered_key(uint16_t bits) {
    return int16_t(bits ^ ((int16_t(bits) >> 15) & 0x7fff));
}

Best span_16(const uint16_t* data, int64_t count, int16_t infinity, bool bf16) {
    constexpr int64_t kKeys = Simd::kKeyWidth;
    int16_t best = int16_t(-infinity - 1);  // the key of -inf
    int64_t block = 0;
    for (int64_t begin = 0; begin < count; begin += 2 * kBlock) {
        const int64_t end = begin + 2 * kBlock < count ? begin + 2 * kBlock : count;
        int16_t high = -32768, low = 32767;
        int64_t i = begin;
        if (end - begin >= 2 * kKeys) {
            Simd::Keys high_a = Simd::fill_keys(high), high_b = high_a;
            Simd::Keys low_a = Simd::fill_keys(low), low_b = low_a;
            for (; i + 2 * kKeys <= end; i += 2 * kKeys) {
                const Simd::Keys p = Simd::load_keys(data + i);
                const Simd::Keys q = Simd::load_keys(data + i + kKeys);
                high_a = Simd::max_keys(high_a, p);
                high_b = Simd::max_keys(high_b, q);
                low_a = Simd::min_keys(low_a, p);
                low_b = Simd::min_keys(low_b, q);
            }
            high = Simd::reduce_max_keys(Simd::max_keys(high_a, high_b));
            low = Simd::reduce_min_keys(Simd::min_keys(low_a, low_b));
        }
        for (; i < end; ++i) {
            const int16_t key = ordered_key(data[i]);
            high = key > high ? key : high;
            low = key < low ? key : low;
        }
        if (high > infinity || low < -infinity - 1) {
            for (i = begin; i < end; ++i) {
                const int16_t key = ordered_key(data[i]);
                if (key > infinity || key < -infinity - 1) return {__builtin_nanf(""), i};
            }
        }
        if (high > best) {
            best = high;
            block = begin;
        }
    }
    int64_t index = block;
    if (best == 0 || best == -1) {
        // -0 and +0 have different keys but are equal: the first of either wins.
        index = 0;
        while ((data[index] & 0x7fffu) != 0) ++index;
    } else {
        const uint16_t pattern = uint16_t(best < 0 ? best ^ 0x7fff : best);
        while (index + kKeys <= count && !Simd::equals_any(data + index, pattern)) index += kKeys;
        while (data[index] != pattern) ++index;
    }
    return {bf16 ? widen_bf16(data[index]) : widen_f16(data[index]), index};
}

Best span(const void* data, Dtype dtype, int64_t count) {
    if (dtype == Dtype::kFloat32) {
        return span_of(Reader<Float32, false>{static_cast<const float*>(data), nullptr}, count);
    }
    const bool bf16 = dtype == Dtype::kBFloat16;
    return span_16(static_cast<const uint16_t*>(data), count, bf16 ? 0x7f80 : 0x7c00, bf16);
}

// Calls visit(reader) with the reader that fits the scores.
template <typename Visit>
auto with_reader(const Scores& scores, Visit visit) {
    const float* wide = static_cast<const float*>(scores.data);
    const uint16_t* narrow = static_cast<const uint16_t*>(scores.data);
    const float* bias = scores.bias;
    switch (scores.dtype) {
        case Dtype::kFloat32:
            return bias ? visit(Reader<Float32, true>{wide, bias})
                        : visit(Reader<Float32, false>{wide, bias});
        case Dtype::kBFloat16:
            return bias ? visit(Reader<BFloat16, true>{narrow, bias})
                        : visit(Reader<BFloat16, false>{narrow, bias});
        default:
            return bias ? visit(Reader<Float16, true>{narrow, bias})
                        : visit(Reader<Float16, false>{narrow, bias});
    }
}

float largest(const Scores& scores) {
    return with_reader(scores, [&](const auto& x) { return block_max(x, 0, scores.count); });
}

int64_t first_at_least(const Scores& scores, int64_t begin, float threshold) {
    return with_reader(
        scores, [&](const auto& x) { return find_first(x, begin, scores.count, threshold); });
}

template <typename Type>
float dot_of(const uint16_t* a, const uint16_t* b, int64_t width) {
    constexpr int64_t kWidth = Simd::kWidth;
    Simd::Vec first = Simd::fill(0.0f), second = first;
    int64_t i = 0;
    for (; i + 2 * kWidth <= width; i += 2 * kWidth) {
        first = Simd::multiply_add(Type::vector(a + i), Type::vector(b + i), first);
        second =
            Simd::multiply_add(Type::vector(a + i + kWidth), Type::vector(b + i + kWidth), second);
    }
    float sum = Simd::reduce_add(Simd::add(first, second));
    for (; i < width; ++i) sum += Type::scalar(a + i) * Type::scalar(b + i);
    return sum;
}

float dot(const void* a, const void* b, Dtype dtype, int64_t width) {
    const uint16_t* x = static_cast<const uint16_t*>(a);
    const uint16_t* y = static_cast<const uint16_t*>(b);
    return dtype == Dtype::kBFloat16 ? dot_of<BFloat16>(x, y, width) : dot_of<Float16>(x, y, width);
}
