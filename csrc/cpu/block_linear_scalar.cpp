// Any CPU: the compiler's own vectors of four, which are registers wherever there are any.
#include "block_linear.h"

namespace cllm {
namespace {

#include "half.h"

#include "block_linear_plain.h"

struct Simd : Plain<Simd, 4> {
    static constexpr int64_t kWidth = 4;
    static constexpr int kAccumulators = 12;  // of 16 registers or more
    typedef float Vec __attribute__((vector_size(16)));
    typedef uint32_t Bits __attribute__((vector_size(16)));

    static Vec load(const float* data) {
        Vec out;
        __builtin_memcpy(&out, data, sizeof out);
        return out;
    }
    static Vec load_bf16(const uint16_t* data) { return Vec(widened(data) << 16); }
    static Vec load_f16(const uint16_t* data) {
        const Bits bits = widened(data);
        const Bits sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
        // a subnormal number is its mantissa * 2^-24, exact in fp32
        const Bits below = Bits(__builtin_convertvector(size, Vec) * 5.9604644775390625e-8f);
        const Bits normal = (size << 13) + (112u << 23);
        const Bits endless = Bits(size >= 0x7c00u) & 0x7f800000u;
        const Bits is_below = Bits(size < 0x400u);
        return Vec(sign | (is_below & below) | (~is_below & normal) | endless);
    }
    static Vec held(Vec x) { return x; }
    static void store(float* data, Vec x) { __builtin_memcpy(data, &x, sizeof x); }
    static Vec fill(float value) { return Vec{value, value, value, value}; }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
    static float reduce_add(Vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
    // always_inline: gcc takes a function that only prefetches for one that does nothing
    __attribute__((always_inline)) static void prefetch(const void* place) {
        __builtin_prefetch(place, 0, 2);
    }

  private:
    static Bits widened(const uint16_t* data) {
        typedef uint16_t Halves __attribute__((vector_size(8)));
        Halves halves;
        __builtin_memcpy(&halves, data, sizeof halves);
        return __builtin_convertvector(halves, Bits);
    }
};

#include "block_linear_body.h"
#include "block_linear_types.h"

}  // namespace

const BlockLinearKernels kBlockLinearScalar{span, make_input, sizeof(float)};

}  // namespace cllm
