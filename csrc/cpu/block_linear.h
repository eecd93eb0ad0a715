// block_linear's kernels, compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops.h"

namespace cllm {

// The rows as `BlockLinearKernels::input` makes them; padded widths are multiples of
// kBlockLinearPadding.
struct BlockLinearInput {
    const void* x;    // [rows, padded]
    const void* low;  // [rows, padded_rank]: x @ a.T, zeros in rows that are not gated; or null
    int64_t padded;
    int64_t padded_rank;
};

struct BlockLinearKernels {
    // Writes columns first .. last - 1 of every row.
    void (*span)(const BlockLinear& linear, const BlockLinearInput& input, int64_t first,
                 int64_t last);
    // Writes one row for `span`, [padded], from data [count], with zeros behind it.
    void (*input)(const void* data, Dtype dtype, int64_t count, void* out, int64_t padded);
    int64_t input_bytes;  // of an element that `input` writes: 4, fp32; or 2, bf16 as it is
};

constexpr int64_t kBlockLinearPadding = 32;

extern const BlockLinearKernels kBlockLinearScalar;
#if defined(__x86_64__)
extern const BlockLinearKernels kBlockLinearAvx2;
extern const BlockLinearKernels kBlockLinearAvx512;
extern const BlockLinearKernels kBlockLinearAvx512Bf16;  // bf16 alone, by its dot products
#endif

// Several linear layers of the same x, by the threads of the parallel region that all of them call
// this in, with the same arguments; outputs are there when it returns. `scratch` has room for
// block_linear_scratch, kLine bytes aligned.
void block_linears_in_team(const BlockLinear* linears, int64_t count, char* scratch);

int64_t block_linear_scratch(const BlockLinear* linears, int64_t count);

}  // namespace cllm
