// A linear layer whose weight lies across: [width, columns], as GPT-2's Conv1D has it. Included
// behind block_linear_body.h, inside its anonymous namespace.
//
// Some rows of the weight at a time are read side by side, each in the order it lies in memory, and
// added to sums in L1 of all rows of x and as many columns as fit there. A column's sum goes along
// the width one product after the other: a row's result has the same bits beside any other rows.

constexpr int64_t kSums = 8192;      // 32 KiB
constexpr int64_t kMostAcross = 64;  // rows of x that share a pass
constexpr int kDeep = 8;             // rows of the weight that are read side by side
constexpr int kBroad = 2;            // vectors of each

// sums [rows, tile], columns 0 .. count - 1: adds kRows rows of the weight, stride apart, times
// columns 0 .. kRows - 1 of x.
template <typename Type, int kRows, int kVectors>
__attribute__((always_inline)) inline void add_vectors(float* sums, int64_t tile, int64_t rows,
                                                       const typename Type::Element* weight,
                                                       int64_t stride, const float* x,
                                                       int64_t padded) {
    constexpr int64_t kWidth = Simd::kWidth;
    Vec weights[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) {
            weights[i][v] = Type::load(weight + i * stride + v * kWidth);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* const place = sums + r * tile;
        Vec sum[kVectors];
        for (int v = 0; v < kVectors; ++v) sum[v] = Simd::load(place + v * kWidth);
        for (int i = 0; i < kRows; ++i) {
            const Vec factor = Simd::fill(x[r * padded + i]);
            for (int v = 0; v < kVectors; ++v) {
                sum[v] = Simd::multiply_add(factor, weights[i][v], sum[v]);
            }
        }
        for (int v = 0; v < kVectors; ++v) Simd::store(place + v * kWidth, sum[v]);
    }
}

template <typename Type, int kRows>
void add_rows(float* sums, int64_t tile, int64_t rows, const typename Type::Element* weight,
              int64_t stride, const float* x, int64_t padded, int64_t count) {
    constexpr int64_t kWidth = Simd::kWidth;
    int64_t column = 0;
    for (; column + kBroad * kWidth <= count; column += kBroad * kWidth) {
        add_vectors<Type, kRows, kBroad>(sums + column, tile, rows, weight + column, stride, x,
                                         padded);
    }
    for (; column + kWidth <= count; column += kWidth) {
        add_vectors<Type, kRows, 1>(sums + column, tile, rows, weight + column, stride, x, padded);
    }
    if (column == count) return;
    for (int i = 0; i < kRows; ++i) {
        const Vec weights = Type::load_some(weight + i * stride + column, count - column);
        for (int64_t r = 0; r < rows; ++r) {
            float* const place = sums + r * tile + column;
            const Vec factor = Simd::fill(x[r * padded + i]);
            Simd::store(place, Simd::multiply_add(factor, weights, Simd::load(place)));
        }
    }
}

template <typename Type, typename Out>
void typed_across(const BlockLinear& linear, const BlockLinearInput& input, int64_t first,
                  int64_t last) {
    using Element = typename Type::Element;
    alignas(64) float sums[kSums];
    const auto* const bias = static_cast<const Element*>(linear.bias);
    for (int64_t row = 0; row < linear.rows; row += kMostAcross) {
        const int64_t rows = linear.rows - row < kMostAcross ? linear.rows - row : kMostAcross;
        const auto* const x = static_cast<const float*>(input.x) + row * input.padded;
        // whole vectors, also behind the last column
        const int64_t tile = kSums / rows / (kBroad * Simd::kWidth) * (kBroad * Simd::kWidth);
        for (int64_t begin = first; begin < last; begin += tile) {
            const int64_t count = last - begin < tile ? last - begin : tile;
            const auto* const weight = static_cast<const Element*>(linear.weight) + begin;
            for (int64_t i = 0; i < rows * tile; ++i) sums[i] = 0.0f;
            int64_t k = 0;
            for (; k + kDeep <= linear.width; k += kDeep) {
                add_rows<Type, kDeep>(sums, tile, rows, weight + k * linear.weight_stride,
                                      linear.weight_stride, x + k, input.padded, count);
            }
            for (; k < linear.width; ++k) {
                add_rows<Type, 1>(sums, tile, rows, weight + k * linear.weight_stride,
                                  linear.weight_stride, x + k, input.padded, count);
            }
            for (int64_t r = 0; r < rows; ++r) {
                auto* const out = static_cast<typename Out::Element*>(linear.out) +
                                  (row + r) * linear.out_stride + begin;
                for (int64_t c = 0; c < count; ++c) {
                    float sum = sums[r * tile + c];
                    if (bias != nullptr) sum += Type::widen(bias[begin + c]);
                    out[c] = Out::narrow(sum);
                }
            }
        }
    }
}
