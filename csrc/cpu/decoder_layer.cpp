// A whole decoder layer for the few rows of a block: one parallel region, in which the weights are
// read once and nothing waits for Python between them.
#include "decoder_layer.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "block_linear.h"

namespace cllm {
namespace {

const DecoderLayerKernels& kernels() {
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

class Pass {
  public:
    Pass(const DecoderLayer& layer, std::vector<char>& buffer)
        : layer_(layer),
          kernel_(kernels()),
          rows_(layer.batch * layer.n),
          size_(layer.dtype == Dtype::kFloat32 ? 4 : 2) {
        const int64_t query = layer.heads * layer.head_size;
        const int64_t key = layer.kv_heads * layer.head_size;
        const int64_t widths[] = {
            layer.hidden_size, layer.hidden_size, layer.hidden_size, query, query, key, key,
            layer.mlp_size,    layer.mlp_size};
        char** const places[] = {&normed_, &projected_, &residual_, &query_, &attended_,
                                 &key_,    &value_,     &gate_,     &up_};
        int64_t bytes = 0;
        for (int64_t width : widths) bytes += whole_lines(rows_ * width * size_);
        const BlockLinear inputs[] = {linear(kQuery, nullptr, nullptr),
                                      linear(kKey, nullptr, nullptr),
                                      linear(kValue, nullptr, nullptr)};
        const BlockLinear output = linear(kOutput, nullptr, nullptr);
        const BlockLinear widening[] = {linear(kGate, nullptr, nullptr),
                                        linear(kUp, nullptr, nullptr)};
        const BlockLinear narrowing = linear(kDown, nullptr, nullptr);
        const int64_t scratch =
            std::max({block_linear_scratch(inputs, 3), block_linear_scratch(&output, 1),
                      block_linear_scratch(widening, 2), block_linear_scratch(&narrowing, 1)});
        char* data = aligned_bytes(buffer, bytes + scratch);
        for (int64_t i = 0; i < 9; ++i) {
            *places[i] = data;
            data += whole_lines(rows_ * widths[i] * size_);
        }
        scratch_ = data;
    }

    // Every thread of the region runs this.
    void run() const {
        norm(static_cast<const char*>(layer_.hidden), layer_.attention_norm);
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
        finish();
    }

  private:
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

    void norm(const char* x, const void* weight) const {
        const int64_t bytes = layer_.hidden_size * size_;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows_; ++row) {
            kernel_.rms_norm(x + row * bytes, weight, layer_.dtype, layer_.hidden_size, layer_.eps,
                             normed_ + row * bytes);
        }
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

    void attend() const {
        const int64_t groups = layer_.heads / layer_.kv_heads;
        const int64_t bytes = layer_.head_size * size_;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows_ * layer_.kv_heads; ++item) {
            const int64_t row = item / layer_.kv_heads, head = item % layer_.kv_heads;
            const int64_t batch_row = row / layer_.n, token = row % layer_.n;
            const int64_t length = layer_.lengths[batch_row];
            const int64_t offset = (row * layer_.heads + head * groups) * bytes;
            QueryRow query{query_ + offset,
                           attended_ + offset,
                           slot(layer_.keys, batch_row, head, 0),
                           slot(layer_.values, batch_row, head, 0),
                           layer_.keys.slot,
                           layer_.values.slot,
                           groups,
                           layer_.head_size,
                           0,
                           0,
                           0,
                           0,
                           layer_.scale};
            see(query, length, token);
            kernel_.attend(query, layer_.dtype);
        }
    }

    // Verify rows, and those of a block without guess rows, see what is committed and the block up
    // to themselves. A guess row stands at the position of its number in its chain, and of the
    // block it sees that chain alone.
    void see(QueryRow& query, int64_t length, int64_t token) const {
        const int64_t guess = token - layer_.guesses_from;
        query.split = length;
        query.shift = guess < 0 ? 0 : token - guess % layer_.guess_width;
        const int64_t position = length + token - query.shift;
        query.begin = layer_.window > 0 ? std::max<int64_t>(position - layer_.window + 1, 0) : 0;
        query.end = position + 1;
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

    void finish() const {
        const int64_t bytes = layer_.hidden_size * size_;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows_; ++row) {
            kernel_.add(residual_ + row * bytes, projected_ + row * bytes, layer_.dtype,
                        layer_.hidden_size, static_cast<char*>(layer_.out) + row * bytes);
        }
    }

    const DecoderLayer& layer_;
    const DecoderLayerKernels& kernel_;
    const int64_t rows_;
    const int64_t size_;  // of an element
    // [rows_, hidden_size]; [rows_, heads * head_size]; [rows_, kv_heads * head_size];
    // [rows_, mlp_size]
    char *normed_, *projected_, *residual_, *query_, *attended_, *key_, *value_, *gate_, *up_;
    char* scratch_;
};

}  // namespace

int64_t decoder_layer_cpu(const DecoderLayer& layer, int threads) {
    for (int64_t row = 0; row < layer.batch; ++row) {
        const int64_t length = layer.lengths[row];
        if (length < 0 || length > layer.capacity - layer.n) return row;
    }
    if (layer.batch == 0 || layer.n == 0) return -1;
    static thread_local std::vector<char> buffer;
    const Pass pass(layer, buffer);
    (void)threads;  // unused by a compiler without OpenMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    pass.run();
    return -1;
}

}  // namespace cllm
