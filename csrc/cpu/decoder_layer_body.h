// decoder_layer.h over a vector type. Each decoder_layer_<isa>.cpp defines `Simd` and includes
// this, all inside an anonymous namespace: no function here may be shared between translation units
// that are compiled for different instruction sets.
//
// Arithmetic is fp32; 16-bit types are rounded where HuggingFace's modules round them, so that both
// stay as close as sums in another order can be. What is summed in which order depends on sizes and
// slots alone: a row has the same bits beside any other rows.

using Vec = Simd::Vec;

#include "exp_body.h"

constexpr int64_t kWidth = Simd::kWidth;

struct Float32 {
    using Element = float;
    static Vec load(const float* data) { return Simd::load(data); }
    static void store(float* data, Vec x) { Simd::store(data, x); }
    static Vec rounded(Vec x) { return x; }
};
struct BFloat16 {
    using Element = uint16_t;
    static Vec load(const uint16_t* data) { return Simd::load_bf16(data); }
    static void store(uint16_t* data, Vec x) { Simd::store_bf16(data, x); }
    static Vec rounded(Vec x) {
        uint16_t bits[kWidth];
        store(bits, x);
        return load(bits);
    }
};
struct Float16 {
    using Element = uint16_t;
    static Vec load(const uint16_t* data) { return Simd::load_f16(data); }
    static void store(uint16_t* data, Vec x) { Simd::store_f16(data, x); }
    static Vec rounded(Vec x) {
        uint16_t bits[kWidth];
        store(bits, x);
        return load(bits);
    }
};

// A vector's worth of data [left], zeros behind its end.
template <typename Type>
inline Vec load_some(const typename Type::Element* data, int64_t left) {
    if (left >= kWidth) return Type::load(data);
    typename Type::Element some[kWidth] = {};
    __builtin_memcpy(some, data, left * sizeof some[0]);
    return Type::load(some);
}

template <typename Type>
inline void store_some(typename Type::Element* data, Vec x, int64_t left) {
    if (left >= kWidth) return Type::store(data, x);
    typename Type::Element some[kWidth];
    Type::store(some, x);
    __builtin_memcpy(data, some, left * sizeof some[0]);
}

template <typename Type>
void rms_norm_of(const typename Type::Element* x, const typename Type::Element* weight,
                 int64_t count, float eps, typename Type::Element* out) {
    Vec sums = Simd::fill(0.0f);
    for (int64_t i = 0; i < count; i += kWidth) {
        const Vec part = load_some<Type>(x + i, count - i);
        sums = Simd::multiply_add(part, part, sums);
    }
    const float mean = Simd::reduce_add(sums) / static_cast<float>(count);
    const Vec factor = Simd::fill(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < count; i += kWidth) {
        const Vec normed = Type::rounded(Simd::mul(load_some<Type>(x + i, count - i), factor));
        const Vec scaled = Simd::mul(load_some<Type>(weight + i, count - i), normed);
        store_some<Type>(out + i, scaled, count - i);
    }
}

template <typename Type>
void add_of(const typename Type::Element* x, const typename Type::Element* y, int64_t count,
            typename Type::Element* out) {
    for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t left = count - i;
        store_some<Type>(
            out + i, Simd::add(load_some<Type>(x + i, left), load_some<Type>(y + i, left)), left);
    }
}

template <typename Type>
void rotate_of(typename Type::Element* head, const typename Type::Element* cos,
               const typename Type::Element* sin, int64_t size) {
    const int64_t half = size / 2;
    const Vec zero = Simd::fill(0.0f);
    for (int64_t i = 0; i < half; i += kWidth) {
        const int64_t left = half - i;
        const Vec first = load_some<Type>(head + i, left);
        const Vec second = load_some<Type>(head + half + i, left);
        const auto turned = [&](Vec own, Vec other, int64_t place) {
            const Vec kept = Type::rounded(Simd::mul(own, load_some<Type>(cos + place, left)));
            const Vec moved = Type::rounded(Simd::mul(other, load_some<Type>(sin + place, left)));
            return Simd::add(kept, moved);
        };
        const Vec low = turned(first, Simd::sub(zero, second), i);
        const Vec high = turned(second, first, half + i);
        store_some<Type>(head + i, low, left);
        store_some<Type>(head + half + i, high, left);
    }
}

template <typename Type>
void silu_multiply_of(typename Type::Element* gate, const typename Type::Element* up,
                      int64_t count) {
    const Vec one = Simd::fill(1.0f);
    for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t left = count - i;
        const Vec x = load_some<Type>(gate + i, left);
        // x / (1 + exp(-x)), by the exponential of what is not positive
        const Vec fading = exp_of(Simd::sub(Simd::fill(0.0f), Simd::abs(x)));
        const Vec numerator = Simd::select_below(x, 0.0f, fading, one);
        const Vec sigmoid = Simd::div(numerator, Simd::add(one, fading));
        const Vec activated = Type::rounded(Simd::mul(x, sigmoid));
        store_some<Type>(gate + i, Simd::mul(activated, load_some<Type>(up + i, left)), left);
    }
}

#include "attend_body.h"

// Calls f with the type that `dtype` names.
template <typename F>
void with_type(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::kFloat32:
            return f(Float32{});
        case Dtype::kBFloat16:
            return f(BFloat16{});
        case Dtype::kFloat16:
            return f(Float16{});
    }
}

template <typename Type>
const typename Type::Element* as(Type, const void* data) {
    return static_cast<const typename Type::Element*>(data);
}
template <typename Type>
typename Type::Element* as(Type, void* data) {
    return static_cast<typename Type::Element*>(data);
}

void rms_norm(const void* x, const void* weight, Dtype dtype, int64_t count, float eps, void* out) {
    with_type(dtype, [&](auto type) {
        rms_norm_of<decltype(type)>(as(type, x), as(type, weight), count, eps, as(type, out));
    });
}

void add(const void* x, const void* y, Dtype dtype, int64_t count, void* out) {
    with_type(dtype, [&](auto type) {
        add_of<decltype(type)>(as(type, x), as(type, y), count, as(type, out));
    });
}

void rotate(void* head, const void* cos, const void* sin, Dtype dtype, int64_t size) {
    with_type(dtype, [&](auto type) {
        rotate_of<decltype(type)>(as(type, head), as(type, cos), as(type, sin), size);
    });
}

void silu_multiply(void* gate, const void* up, Dtype dtype, int64_t count) {
    with_type(dtype, [&](auto type) {
        silu_multiply_of<decltype(type)>(as(type, gate), as(type, up), count);
    });
}

void attend(const QueryRows& rows, Dtype dtype) {
    with_type(dtype, [&](auto type) { attend_of<decltype(type)>(rows); });
}
