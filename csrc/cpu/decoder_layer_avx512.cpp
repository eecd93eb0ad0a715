// Compiled with AVX-512 flags and called only where the CPU has it.
#include "decoder_layer.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

namespace cllm {
namespace {

#include "vectors_avx512.h"

#include "decoder_layer_body.h"

}  // namespace

const DecoderLayerKernels kDecoderLayerAvx512{rms_norm, add, rotate, silu_multiply, attend};

}  // namespace cllm
#endif
