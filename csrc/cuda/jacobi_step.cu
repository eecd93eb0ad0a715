// The fixed-point step of Jacobi decoding on a GPU: one block of one warp per row, one launch, no
// host in between, so that a CUDA graph can hold it. cllm_kernels/jacobi_step/reference.py says
// what it computes.
#include <climits>

#include "device.h"
#include "ops.h"

namespace cllm {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int smallest(int value) { return __reduce_min_sync(kAll, value); }

// A block per row spreads few rows over as many multiprocessors.
__global__ void __launch_bounds__(kWarp) jacobi_step_kernel(const JacobiStep step) {
    const int64_t row = blockIdx.x;
    const int lane = threadIdx.x;

    const int n = static_cast<int>(step.n);
    int64_t* w = step.window + row * step.n;             // [n]
    const int64_t* p = step.predictions + row * step.n;  // [n]
    const int64_t generated = step.generated[row];
    const int64_t room = step.limits[row] - generated;
    const bool was_done = step.done[row] || step.limits[row] <= generated;
    const int m = static_cast<int>(step.progress[row]);
    __syncwarp();  // every lane has read the row's state before lane 0 may write it
    if (was_done) {
        if (lane == 0) {
            step.accepted[row] = 0;
            step.done[row] = true;
        }
        return;
    }

    // First guess that the forward pass did not confirm; n when there is none. A warp looks at 32
    // guesses at once and stops at the first of them that differs.
    int k = n;
    for (int base = m + 1; base < n; base += kWarp) {
        const int i = base + lane;
        const bool differs = i < n && w[i] != p[i - 1];
        const unsigned found = __ballot_sync(kAll, differs);
        if (found != 0) {
            k = base + __ffs(static_cast<int>(found)) - 1;
            break;
        }
    }
    if (step.accept_one) k = min(k, m + 1);

    int count = k - m;
    bool finished = count >= room;
    if (finished) count = static_cast<int>(room);
    if (step.stops > 0) {
        int first = INT_MAX;
        for (int j = lane; j < count && first == INT_MAX; j += kWarp) {
            const int64_t token = p[m + j];
            for (int64_t s = 0; s < step.stops; ++s) {
                if (step.stop_ids[s] == token) first = j;
            }
        }
        first = smallest(first);
        if (first < count) {
            count = first + 1;
            finished = true;
        }
    }

    int64_t* out = step.output + row * step.capacity + generated;  // [capacity - generated]
    for (int j = lane; j < count; j += kWarp) out[j] = p[m + j];

    const int64_t total = generated + count;
    const bool shifts = !finished && !(step.block_mode && k < n);
    // The new window is made of predictions and fill alone, so no lane reads what another writes.
    if (shifts) {
        const int64_t* fill = step.fill + row * step.fill_width;  // [fill_width], unread when null
        for (int i = lane; i < n; i += kWarp) {
            const int source = k - 1 + i;
            int64_t token = p[min(source, n - 1)];
            if (source >= n && step.fill != nullptr) {
                token = fill[min(total - 1 + i, step.fill_width - 1)];
            }
            w[i] = token;
        }
    } else if (!finished) {
        for (int i = m + 1 + lane; i < n; i += kWarp) w[i] = p[i - 1];
    }
    if (lane == 0) {
        step.accepted[row] = count;
        step.generated[row] = total;
        if (finished) {
            step.done[row] = true;
            step.lengths[row] += m + count;
            step.progress[row] = 0;
            w[0] = p[m + count - 1];
        } else if (shifts) {
            step.lengths[row] += k;
            step.progress[row] = step.block_mode ? 0 : m;
        } else {
            step.progress[row] = k;
        }
    }
}

}  // namespace

const char* jacobi_step_cuda(const JacobiStep& step, int device, void* stream) {
    if (step.rows == 0) return nullptr;
    return launch_on(device, [&] {
        jacobi_step_kernel<<<static_cast<unsigned>(step.rows), kWarp, 0,
                             static_cast<cudaStream_t>(stream)>>>(step);
    });
}

}  // namespace cllm
