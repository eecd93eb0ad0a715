// What a vector type without masks does one by one; included inside an anonymous namespace. `Simd`
// derives from Plain<Simd, kWidth>.
template <typename Own, int64_t kLanes>
struct Plain {
    // The first `count` of a vector, fewer than all, and zeros.
    template <typename Element>
    struct Part {
        Element data[kLanes] = {};
        Part(const Element* from, int64_t count) {
            __builtin_memcpy(data, from, count * sizeof(Element));
        }
    };
    static auto load_some(const float* data, int64_t count) {
        return Own::load(Part<float>(data, count).data);
    }
    static auto load_some_bf16(const uint16_t* data, int64_t count) {
        return Own::load_bf16(Part<uint16_t>(data, count).data);
    }
    static auto load_some_f16(const uint16_t* data, int64_t count) {
        return Own::load_f16(Part<uint16_t>(data, count).data);
    }
    static void narrow_four(const float* data, uint16_t* out) {
        for (int i = 0; i < 4; ++i) out[i] = narrow_bf16(data[i]);
    }
    // out [kCount]: the sum of each vector.
    template <int kCount, typename Vec>
    static void reduce_add_each(const Vec* vectors, float* out) {
        for (int i = 0; i < kCount; ++i) out[i] = Own::reduce_add(vectors[i]);
    }
};
