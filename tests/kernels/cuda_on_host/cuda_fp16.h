// float16 for cuda_runtime.h beside this, through the compiler's own type.
#pragma once

#include "cuda_runtime.h"

struct __half {
    _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
