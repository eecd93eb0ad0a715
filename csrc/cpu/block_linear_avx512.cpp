// Compiled with AVX-512 flags and called only where the CPU has it.
#include "block_linear.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

namespace cllm {
namespace {

#include "half.h"

#include "block_linear_simd512.h"

#include "block_linear_body.h"
#include "block_linear_types.h"

}  // namespace

const BlockLinearKernels kBlockLinearAvx512{span, make_input, sizeof(float)};

}  // namespace cllm
#endif
