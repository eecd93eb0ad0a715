// Compiled with AVX2 flags and called only where the CPU has it.
#include "decoder_layer.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace cllm {
namespace {

#include "vectors_avx2.h"

#include "decoder_layer_body.h"

}  // namespace

const DecoderLayerKernels kDecoderLayerAvx2{rms_norm, add, rotate, silu_multiply, attend};

}  // namespace cllm
#endif
