// The fixed-point step of Jacobi decoding on the CPU: cllm_kernels/jacobi_step/reference.py says
// what it computes, this is the same in one pass over each row.
#include <algorithm>

#include "ops.h"

namespace cllm {
namespace {

// Length of the common prefix of a [count] and b [count]. Eight slots at a time, without a branch
// inside, so that the compiler turns the comparison into vector instructions.
int64_t common_prefix(const int64_t* a, const int64_t* b, int64_t count) {
    constexpr int64_t kStep = 8;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
        int64_t differs = 0;
        for (int64_t j = 0; j < kStep; ++j) differs |= a[i + j] ^ b[i + j];
        if (differs != 0) break;
    }
    while (i < count && a[i] == b[i]) ++i;
    return i;
}

bool is_stop(int64_t token, const int64_t* stop_ids, int64_t stops) {
    for (int64_t s = 0; s < stops; ++s) {
        if (stop_ids[s] == token) return true;
    }
    return false;
}

void step_row(const JacobiStep& step, int64_t row) {
    const int64_t n = step.n;
    int64_t* w = step.window + row * n;             // [n]
    const int64_t* p = step.predictions + row * n;  // [n]
    int64_t* out = step.output + row * step.capacity;
    step.accepted[row] = 0;
    if (step.done[row]) return;

    if (step.limits[row] <= step.generated[row]) {
        step.done[row] = true;
        return;
    }
    const int64_t room = step.limits[row] - step.generated[row];
    const int64_t m = step.progress[row];
    int64_t k = m + 1 + common_prefix(w + m + 1, p + m, n - 1 - m);
    if (step.accept_one) k = std::min(k, m + 1);

    int64_t count = k - m;
    bool finished = false;
    if (count >= room) {
        count = room;
        finished = true;
    }
    if (step.stops > 0) {
        for (int64_t j = 0; j < count; ++j) {
            if (is_stop(p[m + j], step.stop_ids, step.stops)) {
                count = j + 1;
                finished = true;
                break;
            }
        }
    }
    std::copy(p + m, p + m + count, out + step.generated[row]);
    step.generated[row] += count;
    step.accepted[row] = count;

    if (finished) {
        step.done[row] = true;
        step.lengths[row] += m + count;
        step.progress[row] = 0;
        w[0] = p[m + count - 1];
        return;
    }
    if (step.block_mode && k < n) {
        std::copy(p + m, p + n - 1, w + m + 1);
        step.progress[row] = k;
        return;
    }
    // Both modes shift the window here: sliding by k, block by the whole (k == n).
    step.lengths[row] += k;
    if (step.block_mode) step.progress[row] = 0;
    const int64_t kept = n - k + 1;  // p[k-1 .. n-1]
    std::copy(p + k - 1, p + n, w);
    for (int64_t i = kept; i < n; ++i) {
        if (step.fill == nullptr) {
            w[i] = p[n - 1];
        } else {
            const int64_t slot = std::min(step.generated[row] - 1 + i, step.fill_width - 1);
            w[i] = step.fill[row * step.fill_width + slot];
        }
    }
}

}  // namespace

int64_t jacobi_step_cpu(const JacobiStep& step, int threads) {
    for (int64_t row = 0; row < step.rows; ++row) {
        const bool sound = step.progress[row] >= 0 && step.progress[row] < step.n &&
                           step.generated[row] >= 0 && step.generated[row] <= step.capacity &&
                           step.limits[row] <= step.capacity;
        if (!sound) return row;
    }
    // A row takes tens of nanoseconds; waking a thread takes microseconds.
    constexpr int64_t kSlotsPerThread = 1 << 14;
    const int64_t useful = step.rows * step.n / kSlotsPerThread + 1;
    const int workers = static_cast<int>(std::min<int64_t>(threads, useful));
    (void)workers;  // unused by a compiler without OpenMP
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t row = 0; row < step.rows; ++row) step_row(step, row);
    return -1;
}

}  // namespace cllm
