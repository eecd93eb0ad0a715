// Any CPU: short arrays that the compiler turns into whatever vectors the baseline offers.
#include "decoder_layer.h"

namespace cllm {
namespace {

#include "half.h"

#include "vectors_scalar.h"

#include "decoder_layer_body.h"

}  // namespace

const DecoderLayerKernels kDecoderLayerScalar{rms_norm, add, rotate, silu_multiply, attend};

}  // namespace cllm
