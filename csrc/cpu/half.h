// The 16-bit floating-point types, one number at a time. Included inside an anonymous namespace, as
// the *_body.h files: no function here may be shared between translation units that are compiled
// for different instruction sets.
#pragma once

inline float bits_to_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widen_bf16(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }

inline float widen_f16(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
    if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) {
        // Subnormal: mantissa * 2^-24 is exact in fp32.
        const float size = float(mantissa) * 5.9604644775390625e-8f;
        return sign ? -size : size;
    }
    return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Both round to nearest, ties to even.
inline uint16_t narrow_bf16(float x) {
    const uint32_t bits = float_to_bits(x);
    if (x != x) return 0x7fc0;
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t narrow_f16(float x) {
    const uint32_t sign = (float_to_bits(x) >> 16) & 0x8000u;
    const float size = __builtin_fabsf(x);
    if (size != size) return uint16_t(sign | 0x7e00u);
    if (size >= 65520.0f) return uint16_t(sign | 0x7c00u);
    // Adding a power of two that leaves 10 bits behind the point (24 below fp16's normal range)
    // rounds to nearest, ties to even, as fp32 addition does.
    if (size < 6.103515625e-5f) {
        return uint16_t(sign | (float_to_bits(size + 0.5f) - float_to_bits(0.5f)));
    }
    const uint32_t bits = float_to_bits(size);
    const uint32_t nearest = bits + 0xfffu + ((bits >> 13) & 1u);
    return uint16_t(sign | ((nearest - (112u << 23)) >> 13));
}
