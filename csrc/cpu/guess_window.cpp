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

// What followed the end of the row's text where it was found again goes to w[1 .. n - 1]; returns
// how many tokens of it were, 0 where they are fewer than the least, with w as it was.
int64_t from_text(const GuessWindow& guess, int64_t row, int64_t* w) {
    const int64_t* text = guess.sequences + row * guess.width;  // [width]
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
    if (longest < guess.least) return 0;
    int64_t place = found + 1;
    for (int64_t i = 1; i < guess.n; ++i) {
        w[i] = text[place];
        place = place == last ? found + 1 : place + 1;
    }
    return longest;
}

// w [n] holds the window's own tokens, and in the end the pool's chain behind the first.
void from_pool(const GuessWindow& guess, int64_t row, int64_t* w) {
    const int64_t* latest = guess.latest + row * guess.vocabulary;  // [vocabulary]
    for (int64_t i = 1; i < guess.n; ++i) {
        const int64_t token = w[i - 1];
        if (token < 0 || token >= guess.vocabulary) continue;
        const int64_t pair = latest[token];
        if (pair >= 0) w[i] = pair % guess.vocabulary;
    }
}

// Counts what the text has become since the row's proposals were made for or against each.
void learn(const GuessWindow& guess, int64_t row) {
    const int64_t since = guess.since[row];
    if (since < 0) return;
    const int64_t end = std::min(guess.generated[row], guess.end);
    const int64_t known = std::min(end - since, guess.n - 1);
    if (known <= 0) return;
    const int64_t* truth = guess.sequences + row * guess.width + since;  // [known]
    const int64_t kinds = 2 + guess.longest;
    for (int64_t source = 0; source < 3; ++source) {
        const int64_t* made = guess.proposed + (row * 3 + source) * guess.n;  // [n]
        const int64_t kind = made[0];
        if (kind < 0 || kind >= kinds) continue;
        int64_t right = 0;
        while (right < known && made[1 + right] == truth[right]) ++right;
        int64_t* odds = guess.odds + (row * kinds + kind) * 2;  // [2]
        odds[0] += right * kGuess;
        odds[1] += right < known ? kGuess : 0;
        if (odds[0] + odds[1] > kGuessMemory) {
            odds[0] >>= 1;
            odds[1] = std::max<int64_t>(odds[1] >> 1, 1);
        }
    }
}

// Proposals of every source, and the window filled from the one that has been right most often.
void weigh(const GuessWindow& guess, int64_t row) {
    learn(guess, row);
    int64_t* w = guess.window + row * guess.n;                         // [n]
    int64_t* own = guess.proposed + row * 3 * guess.n;                 // [n]
    int64_t* pool = own + guess.n;                                     // [n]
    int64_t* text = pool + guess.n;                                    // [n]
    const int64_t* odds = guess.odds + row * (2 + guess.longest) * 2;  // [2 + longest, 2]
    std::copy(w, w + guess.n, own);
    std::copy(w, w + guess.n, pool);
    std::copy(w, w + guess.n, text);
    if (guess.latest != nullptr) from_pool(guess, row, pool);
    const int64_t run = guess.longest > 0 ? from_text(guess, row, text) : 0;
    own[0] = 0;
    pool[0] = guess.latest != nullptr ? 1 : -1;
    text[0] = run > 0 ? 1 + run : -1;
    guess.since[row] = guess.generated[row];
    const int64_t* best = own;
    for (const int64_t* source : {pool, text}) {
        if (source[0] < 0) continue;
        const int64_t* mine = odds + source[0] * 2;
        const int64_t* its = odds + best[0] * 2;
        if (mine[0] * its[1] >= its[0] * mine[1]) best = source;
    }
    std::copy(best + 1, best + guess.n, w + 1);
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
        if (guess.odds != nullptr) {
            weigh(guess, row);
            continue;
        }
        int64_t* w = guess.window + row * guess.n;  // [n]
        if (guess.sequences != nullptr && from_text(guess, row, w) > 0) continue;
        if (guess.latest != nullptr) from_pool(guess, row, w);
    }
}

}  // namespace cllm
