// What block_linear_<isa>.cpp exports, behind block_linear_body.h.

#include "block_linear_across.h"

template <typename Type, typename Out>
void either_span(const BlockLinear& linear, const BlockLinearInput& input, int64_t first,
                 int64_t last) {
    if (linear.across) return typed_across<Type, Out>(linear, input, first, last);
    typed_span<Type, Out>(linear, input, first, last);
}

void span(const BlockLinear& linear, const BlockLinearInput& input, int64_t first, int64_t last) {
    const bool wide = linear.out_dtype == Dtype::kFloat32;
    switch (linear.dtype) {
        case Dtype::kFloat32:
            return either_span<Float32, Float32>(linear, input, first, last);
        case Dtype::kBFloat16:
            return wide ? either_span<BFloat16, Float32>(linear, input, first, last)
                        : either_span<BFloat16, BFloat16>(linear, input, first, last);
        case Dtype::kFloat16:
            return wide ? either_span<Float16, Float32>(linear, input, first, last)
                        : either_span<Float16, Float16>(linear, input, first, last);
    }
}

template <typename Type>
void fill_input(const typename Type::Element* data, int64_t count, float* input, int64_t padded) {
    constexpr int64_t kWidth = Simd::kWidth;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) Simd::store(input + i, Type::load(data + i));
    for (; i < count; ++i) input[i] = Type::widen(data[i]);
    for (; i < padded; ++i) input[i] = 0.0f;
}

void make_input(const void* data, Dtype dtype, int64_t count, void* out, int64_t padded) {
    float* const row = static_cast<float*>(out);
    const auto* const bits = static_cast<const uint16_t*>(data);
    switch (dtype) {
        case Dtype::kFloat32:
            return fill_input<Float32>(static_cast<const float*>(data), count, row, padded);
        case Dtype::kBFloat16:
            return fill_input<BFloat16>(bits, count, row, padded);
        case Dtype::kFloat16:
            return fill_input<Float16>(bits, count, row, padded);
    }
}
