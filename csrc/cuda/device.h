// What every launcher of a CUDA kernel does around it.
#pragma once

#include <cuda_runtime.h>

namespace cllm {

// Runs `launch` with `device` current and puts the caller's choice back: this library has its own
// static cudart, so the device is named rather than taken as current. nullptr, or what went wrong.
template <typename Launch>
const char* launch_on(int device, Launch launch) {
    int previous = device;
    cudaError_t status = cudaGetDevice(&previous);
    if (status == cudaSuccess && previous != device) status = cudaSetDevice(device);
    if (status != cudaSuccess) return cudaGetErrorString(status);
    launch();
    status = cudaGetLastError();
    if (previous != device) {
        const cudaError_t restored = cudaSetDevice(previous);
        if (status == cudaSuccess) status = restored;
    }
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace cllm
