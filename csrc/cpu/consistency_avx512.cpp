// Compiled with AVX-512 flags and called only where the CPU has it.
#include "consistency.h"

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

#include "consistency_body.h"

}  // namespace

const ConsistencyRow kConsistencyRowAvx512 = &consistency_row;

}  // namespace cllm
#endif
