#include <cstdlib>
#include <cstring>

#include "ops.h"

namespace cllm {
namespace {

Isa detect() {
    Isa best = Isa::kScalar;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        best = Isa::kAvx512;
    }
#endif
    // The environment can only lower the choice: it lets one machine test every path.
    const char* wanted = std::getenv("CLLM_KERNELS_ISA");
    if (wanted != nullptr) {
        if (std::strcmp(wanted, "scalar") == 0) best = Isa::kScalar;
        if (std::strcmp(wanted, "avx2") == 0 && best == Isa::kAvx512) best = Isa::kAvx2;
    }
    return best;
}

}  // namespace

Isa cpu_isa() {
    static const Isa isa = detect();
    return isa;
}

bool cpu_has_bf16_dot() {
#if defined(__x86_64__)
    // asked for by name, AVX-512 is meant without it
    static const bool has = cpu_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16") &&
                            std::getenv("CLLM_KERNELS_ISA") == nullptr;
    return has;
#else
    return false;
#endif
}

}  // namespace cllm
