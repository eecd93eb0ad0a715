// block_linear.h over a vector type. Each block_linear_<isa>.cpp defines `Simd` and includes this,
// all inside an anonymous namespace: no function here may be shared between translation units that
// are compiled for different instruction sets.
//
// A tile is some rows of x times some rows of the weight, one vector of partial sums for each pair,
// along the width. Both lie along the width as they are, so nothing is packed: a weight is read
// from memory once, in the order it lies there, and used for every row while it is in L2.
// Rows of x that one pass does not hold go through in groups, one behind the other over the same
// few rows of the weight, so that a group's rows stay in L1 however wide they are.
//
// What is summed in which order depends on the width alone: a row's result has the same bits in
// every tile, beside any other rows.

using Vec = Simd::Vec;

// A type of weights: Element as it lies in memory, Input what the rows of x have become (see
// block_linear.h), kStep elements of each that one multiply_add takes.
struct Float32 {
    using Element = float;
    using Input = float;
    static constexpr int64_t kStep = Simd::kWidth;
    static Vec load(const float* data) { return Simd::load(data); }
    static Vec load_some(const float* data, int64_t count) { return Simd::load_some(data, count); }
    static Vec load_input(const float* data) { return Simd::load(data); }
    static Vec multiply_add(Vec a, Vec b, Vec c) { return Simd::multiply_add(a, b, c); }
    static float widen(float x) { return x; }
    static float narrow(float x) { return x; }
    static void narrow_four(const float* sums, float* out) {
        __builtin_memcpy(out, sums, 4 * sizeof *sums);
    }
};
struct BFloat16 : Float32 {
    using Element = uint16_t;
    static Vec load(const uint16_t* data) { return Simd::load_bf16(data); }
    static Vec load_some(const uint16_t* data, int64_t count) {
        return Simd::load_some_bf16(data, count);
    }
    static float widen(uint16_t x) { return widen_bf16(x); }
    static uint16_t narrow(float x) { return narrow_bf16(x); }
    static void narrow_four(const float* sums, uint16_t* out) { Simd::narrow_four(sums, out); }
};
struct Float16 : Float32 {
    using Element = uint16_t;
    static Vec load(const uint16_t* data) { return Simd::load_f16(data); }
    static Vec load_some(const uint16_t* data, int64_t count) {
        return Simd::load_some_f16(data, count);
    }
    static float widen(uint16_t x) { return widen_f16(x); }
    static uint16_t narrow(float x) { return narrow_f16(x); }
    static void narrow_four(const float* sums, uint16_t* out) {
        for (int i = 0; i < 4; ++i) out[i] = narrow_f16(sums[i]);
    }
};

// Rows of x that one pass takes alone: as many as the registers hold with two rows of the weight,
// of more than kFewRows no more than L1 holds. What is more goes through in groups of up to kGroup.
constexpr int kAlone = Simd::kAccumulators / 2;
constexpr int kFewRows = 8;
constexpr int64_t kAloneBytes = 32 << 10;
constexpr int kGroup = 6;

// Rows of the weight per tile, by rows of x: what the registers hold, where it comes from L2, four
// at most, whose sums are written by one store. Where it comes from memory few rows at a time are
// quickest, that is in few streams, and all the rest is hidden behind them up to kAlone rows of x.
constexpr int weights_per_tile(int rows, bool from_memory) {
    if (from_memory) return 2;
    return Simd::kAccumulators / rows < 4 ? Simd::kAccumulators / rows : 4;
}
constexpr int kTilesAhead = 4;  // that are asked for from memory

// Rows of the weight that the groups share: a multiple of every number of weights per tile. They
// and what is asked for behind them stay in L2.
constexpr int64_t kShared = 24;
constexpr int64_t kSharedBytes = 256 << 10;

// Adds the products of `width` elements: of rows of the weight, stride apart, and of rows of the
// input from kFrom on, padded apart.
template <typename Type, int kRows, int kWeights, bool kPrefetch, int kFrom = 0>
// as a function of its own it would keep the sums in memory
__attribute__((always_inline)) inline void accumulate(Vec (&sums)[kRows * kWeights],
                                                      const typename Type::Element* weight,
                                                      int64_t stride,
                                                      const typename Type::Input* input,
                                                      int64_t padded, int64_t width) {
    constexpr int64_t kStep = Type::kStep;
    const int64_t whole = width / kStep * kStep;
    for (int64_t k = 0; k < whole; k += kStep) {
        decltype(Type::load(weight)) weights[kWeights];
#pragma GCC unroll 16
        for (int c = 0; c < kWeights; ++c) {
            const auto* const place = weight + c * stride + k;
            weights[c] = Type::load(place);
            // A row of the weight ends before the hardware has seen where it leads.
            if (kPrefetch) Simd::prefetch(place + kTilesAhead * kWeights * stride);
        }
#pragma GCC unroll 16
        for (int r = kFrom; r < kRows; ++r) {
            auto row = Type::load_input(input + r * padded + k);
            // gcc would read a row again for each of its uses, and there is one read in a cycle;
            // behind reads from memory that is quicker all the same
            if constexpr (!kPrefetch) row = Simd::held(row);
#pragma GCC unroll 16
            for (int c = 0; c < kWeights; ++c) {
                Vec& sum = sums[r * kWeights + c];
                sum = Type::multiply_add(row, weights[c], sum);
            }
        }
    }
    if (whole == width) return;
#pragma GCC unroll 16
    for (int c = 0; c < kWeights; ++c) {
        const auto weights = Type::load_some(weight + c * stride + whole, width - whole);
#pragma GCC unroll 16
        for (int r = kFrom; r < kRows; ++r) {
            const auto row = Type::load_input(input + r * padded + whole);
            Vec& sum = sums[r * kWeights + c];
            sum = Type::multiply_add(row, weights, sum);
        }
    }
}

// Which of a tile's rows have a low-rank term. A window that stands twice fills one tile or two.
enum class Gated { kNone, kSecondHalf, kAny };

inline Gated gated_rows(const BlockLinear& linear, const BlockLinearInput& input, int64_t row,
                        int64_t rows) {
    if (input.low == nullptr) return Gated::kNone;
    int64_t first = rows;
    for (int64_t r = rows - 1; r >= 0; --r) {
        if ((row + r) % linear.period >= linear.gated_from) first = r;
    }
    if (first == rows) return Gated::kNone;
    return first >= rows / 2 ? Gated::kSecondHalf : Gated::kAny;
}

template <typename Type, typename Out, int kRows, int kWeights, bool kPrefetch>
void tile(const BlockLinear& linear, const BlockLinearInput& input, int64_t row, int64_t column,
          Gated gated) {
    using Element = typename Type::Element;
    using Input = typename Type::Input;
    Vec sums[kRows * kWeights];
    // unrolled, here and where they are added to: else gcc keeps the sums in memory between the
    // loops
#pragma GCC unroll 32
    for (int i = 0; i < kRows * kWeights; ++i) sums[i] = Simd::fill(0.0f);
    accumulate<Type, kRows, kWeights, kPrefetch>(
        sums, static_cast<const Element*>(linear.weight) + column * linear.weight_stride,
        linear.weight_stride, static_cast<const Input*>(input.x) + row * input.padded, input.padded,
        linear.width);
    if (gated != Gated::kNone) {
        // In the same sums: a row that is not gated adds zeros, which changes none of its bits.
        const auto* const b = static_cast<const Element*>(linear.b) + column * linear.rank;
        const auto* const low = static_cast<const Input*>(input.low) + row * input.padded_rank;
        if (gated == Gated::kSecondHalf) {
            accumulate<Type, kRows, kWeights, kPrefetch, kRows / 2>(sums, b, linear.rank, low,
                                                                    input.padded_rank, linear.rank);
        } else {
            accumulate<Type, kRows, kWeights, kPrefetch>(sums, b, linear.rank, low,
                                                         input.padded_rank, linear.rank);
        }
    }
    float totals[kRows * kWeights];
    Simd::template reduce_add_each<kRows * kWeights>(sums, totals);
    const auto* const bias = static_cast<const Element*>(linear.bias);
    for (int r = 0; r < kRows; ++r) {
        auto* const out = static_cast<typename Out::Element*>(linear.out) +
                          (row + r) * linear.out_stride + column;
        float* const own = totals + r * kWeights;
        if (bias != nullptr) {
            for (int c = 0; c < kWeights; ++c) own[c] += Type::widen(bias[column + c]);
        }
        if constexpr (kWeights == 4) {
            Out::narrow_four(own, out);
        } else {
            for (int c = 0; c < kWeights; ++c) out[c] = Out::narrow(own[c]);
        }
    }
}

template <typename Type, typename Out, int kRows, bool kPrefetch>
void columns(const BlockLinear& linear, const BlockLinearInput& input, int64_t row, int64_t first,
             int64_t last) {
    constexpr int kWeights = weights_per_tile(kRows, kPrefetch);
    const Gated gated = gated_rows(linear, input, row, kRows);
    int64_t column = first;
    for (; column + kWeights <= last; column += kWeights) {
        tile<Type, Out, kRows, kWeights, kPrefetch>(linear, input, row, column, gated);
    }
    for (; column < last; ++column) {
        tile<Type, Out, kRows, 1, false>(linear, input, row, column, gated);
    }
}

// 1 to kMost rows.
template <typename Type, typename Out, bool kPrefetch, int kMost, int kRows = 1>
void group(const BlockLinear& linear, const BlockLinearInput& input, int64_t row, int64_t rows,
           int64_t first, int64_t last) {
    if (rows == kRows) {
        return columns<Type, Out, kRows, kPrefetch>(linear, input, row, first, last);
    }
    if constexpr (kRows < kMost) {
        group<Type, Out, kPrefetch, kMost, kRows + 1>(linear, input, row, rows, first, last);
    }
}

template <typename Type, typename Out>
void typed_span(const BlockLinear& linear, const BlockLinearInput& input, int64_t first,
                int64_t last) {
    const int64_t input_bytes = linear.rows * input.padded * sizeof(typename Type::Input);
    if (linear.rows <= kAlone && (linear.rows <= kFewRows || input_bytes <= kAloneBytes)) {
        return group<Type, Out, true, kAlone>(linear, input, 0, linear.rows, first, last);
    }
    const int64_t row_bytes = linear.weight_stride * sizeof(typename Type::Element);
    const int64_t shared = row_bytes * kShared <= kSharedBytes ? kShared : kShared / 2;
    const int64_t groups = (linear.rows + kGroup - 1) / kGroup;
    for (int64_t begin = first; begin < last; begin += shared) {
        const int64_t end = begin + shared < last ? begin + shared : last;
        int64_t row = 0;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t next = linear.rows * (g + 1) / groups;
            if (g == 0) {
                group<Type, Out, true, kGroup>(linear, input, row, next - row, begin, end);
            } else {
                group<Type, Out, false, kGroup>(linear, input, row, next - row, begin, end);
            }
            row = next;
        }
    }
}
