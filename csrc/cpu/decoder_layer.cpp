// Whole decoder layers for the few rows of a block: one parallel region, in which the weights are
// read once and nothing waits for Python between them.
#include "decoder_layer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "block_linear.h"
#include "scratch.h"
#include "team.h"

namespace cllm {

const DecoderLayerKernels& decoder_layer_kernels() {
#if defined(__x86_64__)
    switch (cpu_isa()) {
        case Isa::kAvx512:
            return kDecoderLayerAvx512;
        case Isa::kAvx2:
            return kDecoderLayerAvx2;
        default:
            return kDecoderLayerScalar;
    }
#else
    return kDecoderLayerScalar;
#endif
}

namespace {

class Pass {
  public:
    explicit Pass(const DecoderLayer& layer)
        : layer_(layer),
          kernel_(decoder_layer_kernels()),
          rows_(layer.batch * layer.n),
          size_(layer.dtype == Dtype::kFloat32 ? 4 : 2) {}

    // Bytes that `place` wants.
    int64_t bytes() const {
        int64_t sum = 0;
        for (int64_t width : widths()) sum += whole_lines(rows_ * width * size_);
        const BlockLinear inputs[] = {linear(kQuery, nullptr, nullptr),
                                      linear(kKey, nullptr, nullptr),
                                      linear(kValue, nullptr, nullptr)};
        const BlockLinear output = linear(kOutput, nullptr, nullptr);
        const BlockLinear widening[] = {linear(kGate, nullptr, nullptr),
                                        linear(kUp, nullptr, nullptr)};
        const BlockLinear narrowing = linear(kDown, nullptr, nullptr);
        return sum +
               std::max({block_linear_scratch(inputs, 3), block_linear_scratch(&output, 1),
                         block_linear_scratch(widening, 2), block_linear_scratch(&narrowing, 1)});
    }

    // What is kept between the steps lies there, in lines; layers of equal sizes share it.
    void place(char* data) {
        char** const places[] = {&normed_, &projected_, &residual_, &query_, &attended_,
                                 &key_,    &value_,     &gate_,     &up_};
        const auto all = widths();
        for (size_t i = 0; i < all.size(); ++i) {
            *places[i] = data;
            data += whole_lines(rows_ * all[i] * size_);
        }
        scratch_ = data;
    }

    // Every thread of the region runs this. `next`: the layer behind this one, or null.
    void run(bool first, const Pass* next) const {
        if (first) norm();
        const BlockLinear inputs[] = {linear(kQuery, normed_, query_), linear(kKey, normed_, key_),
                                      linear(kValue, normed_, value_)};
        block_linears_in_team(inputs, 3, scratch_);
        place_heads();
        attend();
        const BlockLinear output = linear(kOutput, attended_, projected_);
        block_linears_in_team(&output, 1, scratch_);
        add_and_norm();
        const BlockLinear widening[] = {linear(kGate, normed_, gate_), linear(kUp, normed_, up_)};
        block_linears_in_team(widening, 2, scratch_);
        activate();
        const BlockLinear narrowing = linear(kDown, gate_, projected_);
        block_linears_in_team(&narrowing, 1, scratch_);
        finish(next);
    }

  private:
    std::array<int64_t, 9> widths() const {
        const int64_t query = columns(kQuery), key = columns(kKey);
        return {layer_.hidden_size, layer_.hidden_size, layer_.hidden_size, query, query, key, key,
                layer_.mlp_size,    layer_.mlp_size};
    }

    int64_t columns(LayerPart part) const {
        switch (part) {
            case kQuery:
                return layer_.heads * layer_.head_size;
            case kKey:
            case kValue:
                return layer_.kv_heads * layer_.head_size;
            case kGate:
            case kUp:
                return layer_.mlp_size;
            default:
                return layer_.hidden_size;
        }
    }

    int64_t width(LayerPart part) const {
        if (part == kOutput) return columns(kQuery);
        return part == kDown ? layer_.mlp_size : layer_.hidden_size;
    }

    BlockLinear linear(LayerPart part, const void* x, void* out) const {
        const LayerLinear& own = layer_.linears[part];
        const int64_t in = width(part), to = columns(part);
        return {
            x,  own.weight, own.bias, out, own.a, own.b,    layer_.dtype, layer_.dtype,     rows_,
            to, in,         in,       in,  to,    own.rank, layer_.n,     layer_.gated_from};
    }

    void norm() const {
        const auto* const hidden = static_cast<const char*>(layer_.hidden);
        const int64_t bytes = layer_.hidden_size * size_;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows_; ++row) norm_row(hidden + row * bytes, row);
    }

    void norm_row(const char* x, int64_t row) const {
        kernel_.rms_norm(x, layer_.attention_norm, layer_.dtype, layer_.hidden_size, layer_.eps,
                         normed_ + row * layer_.hidden_size * size_);
    }

    char* slot(const LayerCache& cache, int64_t batch_row, int64_t head, int64_t slot) const {
        return static_cast<char*>(cache.data) +
               (batch_row * cache.row + head * cache.head + slot * cache.slot) * size_;
    }

    // Queries get their norm and rotation where they are; keys and values go to their slots.
    void place_heads() const {
        const int64_t bytes = layer_.head_size * size_;
        const int64_t pieces = layer_.heads + 2 * layer_.kv_heads;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows_ * pieces; ++item) {
            const int64_t row = item / pieces, piece = item % pieces;
            const int64_t batch_row = row / layer_.n, token = row % layer_.n;
            if (piece < layer_.heads) {
                turn(query_ + (row * layer_.heads + piece) * bytes, layer_.query_norm, row);
                continue;
            }
            const int64_t head = (piece - layer_.heads) % layer_.kv_heads;
            const int64_t place = layer_.lengths[batch_row] + token;
            const int64_t from = (row * layer_.kv_heads + head) * bytes;
            if (piece < layer_.heads + layer_.kv_heads) {
                turn(key_ + from, layer_.key_norm, row);
                std::memcpy(slot(layer_.keys, batch_row, head, place), key_ + from,
                            static_cast<size_t>(bytes));
            } else {
                std::memcpy(slot(layer_.values, batch_row, head, place), value_ + from,
                            static_cast<size_t>(bytes));
            }
        }
    }

    void turn(char* head, const void* norm, int64_t row) const {
        const int64_t size = layer_.head_size;
        if (norm != nullptr) kernel_.rms_norm(head, norm, layer_.dtype, size, layer_.eps, head);
        const int64_t place = (row / layer_.n * layer_.rotary_row + row % layer_.n * size) * size_;
        kernel_.rotate(head, static_cast<const char*>(layer_.cos) + place,
                       static_cast<const char*>(layer_.sin) + place, layer_.dtype, size);
    }

    // Rows that share the reading of keys: as many as leave every thread of the region two pieces.
    int64_t together() const {
        int64_t rows = kMostTogether;
        const auto pieces = [&] {
            return layer_.batch * layer_.kv_heads * ((layer_.n - 1) / rows + 1);
        };
        while (rows > 1 && pieces() < 2 * team_size()) rows /= 2;
        return rows;
    }

    void attend() const {
        const int64_t groups = layer_.heads / layer_.kv_heads;
        const int64_t shared = together(), blocks = (layer_.n - 1) / shared + 1;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < layer_.batch * blocks * layer_.kv_heads; ++item) {
            const int64_t head = item % layer_.kv_heads;
            const int64_t batch_row = item / layer_.kv_heads / blocks;
            const int64_t first = item / layer_.kv_heads % blocks * shared;
            const int64_t row = batch_row * layer_.n + first;
            const int64_t offset = (row * layer_.heads + head * groups) * layer_.head_size * size_;
            QueryRows query{query_ + offset,
                            attended_ + offset,
                            slot(layer_.keys, batch_row, head, 0),
                            slot(layer_.values, batch_row, head, 0),
                            std::min(shared, layer_.n - first),
                            layer_.heads * layer_.head_size,
                            layer_.keys.slot,
                            layer_.values.slot,
                            groups,
                            layer_.head_size,
                            layer_.scale,
                            {}};
            for (int64_t i = 0; i < query.rows; ++i) {
                query.seen[i] = seen(layer_.lengths[batch_row], first + i);
            }
            kernel_.attend(query, layer_.dtype);
        }
    }

    // Verify rows, and those of a block without guess rows, see what is committed and the block up
    // to themselves. A guess row stands at the position of its number in its chain, and of the
    // block it sees that chain alone.
    Seen seen(int64_t length, int64_t token) const {
        const int64_t guess = token - layer_.guesses_from;
        const int64_t shift = guess < 0 ? 0 : token - guess % layer_.guess_width;
        const int64_t position = length + token - shift;
        const int64_t begin =
            layer_.window > 0 ? std::max<int64_t>(position - layer_.window + 1, 0) : 0;
        return {begin, position + 1, length, shift};
    }

    void add_and_norm() const {
        const int64_t bytes = layer_.hidden_size * size_;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows_; ++row) {
            char* const residual = residual_ + row * bytes;
            kernel_.add(static_cast<const char*>(layer_.hidden) + row * bytes,
                        projected_ + row * bytes, layer_.dtype, layer_.hidden_size, residual);
            kernel_.rms_norm(residual, layer_.mlp_norm, layer_.dtype, layer_.hidden_size,
                             layer_.eps, normed_ + row * bytes);
        }
    }

    void activate() const {
        constexpr int64_t kPiece = 256;
        const int64_t pieces = (layer_.mlp_size + kPiece - 1) / kPiece;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows_ * pieces; ++item) {
            const int64_t begin = item % pieces * kPiece;
            const int64_t place = (item / pieces * layer_.mlp_size + begin) * size_;
            kernel_.silu_multiply(gate_ + place, up_ + place, layer_.dtype,
                                  std::min(kPiece, layer_.mlp_size - begin));
        }
    }

    // The layer's last step and the first of the next one, which no thread has to wait between.
    void finish(const Pass* next) const {
        const int64_t bytes = layer_.hidden_size * size_;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows_; ++row) {
            char* const out = static_cast<char*>(layer_.out) + row * bytes;
            kernel_.add(residual_ + row * bytes, projected_ + row * bytes, layer_.dtype,
                        layer_.hidden_size, out);
            if (next != nullptr) next->norm_row(out, row);
        }
    }

    DecoderLayer layer_;
    const DecoderLayerKernels& kernel_;
    const int64_t rows_;
    const int64_t size_;  // of an element
    // [rows_, hidden_size]; [rows_, heads * head_size]; [rows_, kv_heads * head_size];
    // [rows_, mlp_size]
    char *normed_, *projected_, *residual_, *query_, *attended_, *key_, *value_, *gate_, *up_;
    char* scratch_;
};

}  // namespace

int64_t decoder_layers_cpu(const DecoderLayer* layers, int64_t count, int threads) {
    std::vector<Pass> passes;
    passes.reserve(static_cast<size_t>(count));
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; ++i) {
        const DecoderLayer& layer = layers[i];
        for (int64_t row = 0; row < layer.batch; ++row) {
            const int64_t length = layer.lengths[row];
            if (length < 0 || length > layer.capacity - layer.n) return row;
        }
        passes.emplace_back(layer);
        bytes = std::max(bytes, passes.back().bytes());
    }
    if (count == 0 || layers[0].batch == 0 || layers[0].n == 0) return -1;
    static thread_local Scratch kept;
    std::unique_ptr<char[]> large;
    char* const data = kept.take(bytes, large);
    for (Pass& pass : passes) pass.place(data);
    (void)threads;  // unused by a compiler without OpenMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; ++i) {
        passes[i].run(i == 0, i + 1 < count ? &passes[i + 1] : nullptr);
    }
    return -1;
}

}  // namespace cllm
