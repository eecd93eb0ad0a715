// The parts of decoder_layer that are not linear layers, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "ops.h"

namespace cllm {

// What one query row sees of its row of the batch.
struct Seen {
    // first and last + 1 of the positions
    int64_t begin;
    int64_t end;
    // from this position on, the slot is the position plus the shift, before it the position itself
    int64_t split;
    int64_t shift;
};

constexpr int64_t kMostTogether = 4;

// Query rows of one row of the batch: of each the heads that share a key and value head.
struct QueryRows {
    const void* query;   // [rows, groups, size], rows query_row elements apart
    void* out;           // the same, written
    const void* keys;    // slots key_slot elements apart
    const void* values;  // slots value_slot elements apart
    int64_t rows;        // at most kMostTogether
    int64_t query_row;
    int64_t key_slot;
    int64_t value_slot;
    int64_t groups;
    int64_t size;  // at most kLargestHead
    float scale;
    Seen seen[kMostTogether];
};

constexpr int64_t kLargestHead = 256;

struct DecoderLayerKernels {
    // out [count] = x / rms(x) * weight, as HuggingFace rounds it; may be in place.
    void (*rms_norm)(const void* x, const void* weight, Dtype dtype, int64_t count, float eps,
                     void* out);
    // out [count] = x + y
    void (*add)(const void* x, const void* y, Dtype dtype, int64_t count, void* out);
    // head [size] = head * cos + (-second half, first half) * sin, in place
    void (*rotate)(void* head, const void* cos, const void* sin, Dtype dtype, int64_t size);
    // gate [count] = silu(gate) * up, in place
    void (*silu_multiply)(void* gate, const void* up, Dtype dtype, int64_t count);
    // softmax(scale * q k^T) v over the positions that each row sees
    void (*attend)(const QueryRows& rows, Dtype dtype);
};

extern const DecoderLayerKernels kDecoderLayerScalar;
#if defined(__x86_64__)
extern const DecoderLayerKernels kDecoderLayerAvx2;
extern const DecoderLayerKernels kDecoderLayerAvx512;
#endif

// Those for this CPU.
const DecoderLayerKernels& decoder_layer_kernels();

}  // namespace cllm
