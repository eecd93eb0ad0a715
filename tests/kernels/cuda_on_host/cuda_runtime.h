// CUDA C++ on one CPU thread, for testing kernels where there is no GPU: every thread of a block is
// a fiber that runs until it meets a barrier or a warp operation. Fibers take turns in an order
// that CLLM_HOST_ORDER chooses (forward, reverse), so a result that depends on the order shows a
// missing barrier; a barrier that some threads never reach ends the program with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time, so what its threads share may be static.
#define __shared__ static

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace host {

constexpr unsigned kWarp = 32;

// Where `members` threads wait for each other.
struct Meeting {
    unsigned members = 0, arrived = 0;
    uint64_t generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    std::vector<uint64_t> exchanged;  // [threads], what each thread last offered its warp
    Meeting all;
    ucontext_t scheduler;
    unsigned current = 0;
    uint64_t progress = 0;
    std::function<void()> body;
};
inline Block block;

inline void release(Meeting& meeting) {
    meeting.arrived = 0;
    ++meeting.generation;
    ++block.progress;
}

inline void wait(Meeting& meeting) {
    const uint64_t mine = meeting.generation;
    if (++meeting.arrived >= meeting.members) {
        release(meeting);
        return;
    }
    while (meeting.generation == mine)
        swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

inline void leave(Meeting& meeting) {
    --meeting.members;
    if (meeting.members > 0 && meeting.arrived >= meeting.members) release(meeting);
}

inline Meeting& warp() { return block.warps[block.current / kWarp]; }

inline void run_fiber() {
    block.body();
    block.fibers[block.current].done = true;
    ++block.progress;
    leave(warp());
    leave(block.all);
    swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

inline void run_block(unsigned threads) {
    block.fibers = std::vector<Fiber>(threads);
    block.warps.assign((threads + kWarp - 1) / kWarp, Meeting{});
    block.exchanged.assign(threads, 0);
    block.all = Meeting{threads, 0, 0};
    constexpr size_t kStack = 64 * 1024;
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[i];
        ++block.warps[i / kWarp].members;
        fiber.stack = std::make_unique<char[]>(kStack);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    const char* order = std::getenv("CLLM_HOST_ORDER");
    const bool reverse = order != nullptr && std::strcmp(order, "reverse") == 0;
    for (unsigned left = threads; left > 0;) {
        const uint64_t before = block.progress;
        for (unsigned i = 0; i < threads; ++i) {
            block.current = reverse ? threads - 1 - i : i;
            Fiber& fiber = block.fibers[block.current];
            if (fiber.done) continue;
            threadIdx.x = block.current;
            swapcontext(&block.scheduler, &fiber.context);
            if (fiber.done) --left;
        }
        if (left > 0 && block.progress == before) {
            std::fprintf(stderr, "%u threads of block %u wait for others that never come\n", left,
                         blockIdx.x);
            std::abort();
        }
    }
}

inline void launch(unsigned blocks, unsigned threads, std::function<void()> body) {
    block.body = std::move(body);
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(threads);
}

// The value that lane `from` offers; every lane of the warp must take part.
template <typename T>
T exchange(T value, unsigned from) {
    static_assert(sizeof(T) <= 8);
    std::memcpy(&block.exchanged[block.current], &value, sizeof(T));
    wait(warp());
    T out;
    std::memcpy(&out, &block.exchanged[block.current / kWarp * kWarp + from], sizeof(T));
    wait(warp());
    return out;
}

}  // namespace host

inline void __syncthreads() { host::wait(host::block.all); }
inline void __syncwarp() { host::wait(host::warp()); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
    return host::exchange(value, (threadIdx.x % host::kWarp) ^ unsigned(distance));
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned votes = 0;
    host::block.exchanged[host::block.current] = vote;
    host::wait(host::warp());
    const unsigned first = host::block.current / host::kWarp * host::kWarp;
    for (unsigned i = 0; i < host::kWarp; ++i)
        votes |= unsigned(host::block.exchanged[first + i] != 0) << i;
    host::wait(host::warp());
    return votes;
}
inline int __reduce_min_sync(unsigned, int value) {
    for (int distance = 16; distance > 0; distance /= 2) {
        const int other = __shfl_xor_sync(0u, value, distance);
        value = other < value ? other : value;
    }
    return value;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __expf(float x) { return std::exp(x); }
template <typename A, typename B>
auto min(A a, B b) {
    return a < b ? a : static_cast<decltype(a + b)>(b);
}
template <typename A, typename B>
auto max(A a, B b) {
    return a > b ? a : static_cast<decltype(a + b)>(b);
}
