// Guesses for a window on the CPU: cllm_kernels/guess_window/reference.py says what it computes.
#include "guess_sources.h"

namespace cllm {

void guess_window_cpu(const GuessWindow& guess, int threads) {
    if (guess.n == 1) return;
    const int workers = guess_workers(guess.rows * (guess.width + guess.n), threads);
    (void)workers;  // unused by a compiler without OpenMP
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t row = 0; row < guess.rows; ++row) {
        int64_t* w = guess.window + row * guess.n;  // [n]
        const bool searched = guess.sequences != nullptr && guess.longest > 0;
        Occurrence text = searched ? find_end(guess, row, nullptr, 0) : Occurrence{};
        if (text.run < guess.least) text = {};
        if (guess.odds != nullptr) {
            propose(guess, row, text);
            const Source best = best_source(guess, row, kNone);
            const int64_t* made = guess.proposed + (row * 3 + best) * guess.n;  // [n]
            std::copy(made + 1, made + guess.n, w + 1);
        } else if (text.run > 0) {
            follow(guess, row, text.column, w);
        } else if (guess.latest != nullptr) {
            from_pool(guess, row, w);
        }
    }
}

}  // namespace cllm
