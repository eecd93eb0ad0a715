// Guesses for a window on the CPU: cllm_kernels/guess_window/reference.py says what it computes,
// this is the same by a search from the back, which ends where nothing longer can be found.
#include <algorithm>

#include "ops.h"

namespace cllm {
namespace {

// How many of the `most` tokens up to a equal those up to b.
int64_t common_end(const int64_t* a, const int64_t* b, int64_t most) {
    int64_t run = 0;
    while (run < most && a[-run] == b[-run]) ++run;
    return run;
}

// Whether the end of the row's text was found again, and the window filled from there.
bool from_text(const GuessWindow& guess, int64_t row) {
    const int64_t* text = guess.sequences + row * guess.width;  // [width]
    int64_t* w = guess.window + row * guess.n;                  // [n]
    const int64_t first = std::max<int64_t>(guess.starts[row], 0);
    const int64_t last = std::min(guess.generated[row], guess.end) - 1;
    int64_t longest = 0, found = -1;
    for (int64_t column = last - 1; column >= first && longest < guess.longest; --column) {
        if (text[column] != text[last]) continue;
        const int64_t most = std::min(guess.longest, column - first + 1);
        if (most <= longest) break;  // nor has any column before this one more tokens before it
        const int64_t run = common_end(text + column, text + last, most);
        if (run > longest) {
            longest = run;
            found = column;
        }
    }
    if (longest < guess.least) return false;
    int64_t place = found + 1;
    for (int64_t i = 1; i < guess.n; ++i) {
        w[i] = text[place];
        place = place == last ? found + 1 : place + 1;
    }
    return true;
}

void from_pool(const GuessWindow& guess, int64_t row) {
    const int64_t* latest = guess.latest + row * guess.vocabulary;  // [vocabulary]
    int64_t* w = guess.window + row * guess.n;                      // [n]
    for (int64_t i = 1; i < guess.n; ++i) {
        const int64_t token = w[i - 1];
        if (token < 0 || token >= guess.vocabulary) continue;
        const int64_t pair = latest[token];
        if (pair >= 0) w[i] = pair % guess.vocabulary;
    }
}

}  // namespace

void guess_window_cpu(const GuessWindow& guess, int threads) {
    if (guess.n == 1) return;
    // A column takes a fraction of a nanosecond; waking a thread takes microseconds.
    constexpr int64_t kColumnsPerThread = 1 << 15;
    const int64_t useful = guess.rows * (guess.width + guess.n) / kColumnsPerThread + 1;
    const int workers = static_cast<int>(std::min<int64_t>(threads, useful));
    (void)workers;  // unused by a compiler without OpenMP
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int64_t row = 0; row < guess.rows; ++row) {
        if (guess.sequences != nullptr && from_text(guess, row)) continue;
        if (guess.latest != nullptr) from_pool(guess, row);
    }
}

}  // namespace cllm
