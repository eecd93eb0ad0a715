// Compiled with AVX2 flags and called only where the CPU has it.
#include "consistency.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace cllm {
namespace {

#include "vectors_avx2.h"

#include "consistency_body.h"

}  // namespace

const ConsistencyRow kConsistencyRowAvx2 = &consistency_row;

}  // namespace cllm
#endif
