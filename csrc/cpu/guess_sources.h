// Where guesses come from on the CPU, for guess_window and guess_candidates:
// cllm_kernels/guess_window/reference.py says what is computed.
#pragma once

#include <algorithm>

#include "ops.h"

namespace cllm {

// The sources of a row's proposals, by their place in `proposed`.
enum Source { kOwn = 0, kPool = 1, kText = 2, kNone = 3 };

// Where the end of a text stands earlier in it.
struct Occurrence {
    int64_t run = 0;  // tokens of the end that do; 0: none
    int64_t column = -1;
};

// How many of the `most` tokens up to a equal those up to b.
inline int64_t common_end(const int64_t* a, const int64_t* b, int64_t most) {
    int64_t run = 0;
    while (run < most && a[-run] == b[-run]) ++run;
    return run;
}

// The latest of the longest occurrences behind which none of `taken` [count] stands: a search from
// the back, which ends where nothing longer can be found.
inline Occurrence find_end(const GuessWindow& guess, int64_t row, const int64_t* taken,
                           int64_t count) {
    const int64_t* text = guess.sequences + row * guess.width;  // [width]
    const int64_t first = std::max<int64_t>(guess.starts[row], 0);
    const int64_t last = std::min(guess.generated[row], guess.end) - 1;
    Occurrence found;
    if (first >= last) return found;
    const int64_t end = text[last];
    for (int64_t column = last - 1; found.run < guess.longest; --column) {
        while (column >= first && text[column] != end) --column;
        const int64_t most = std::min(guess.longest, column - first + 1);
        if (most <= found.run) break;  // nor has any column before this one more before it
        if (std::find(taken, taken + count, text[column + 1]) != taken + count) continue;
        const int64_t run = common_end(text + column, text + last, most);
        if (run > found.run) found = {run, column};
    }
    return found;
}

// What followed the text's end at `column` goes to w[1 .. n - 1]; from the end on again and again.
inline void follow(const GuessWindow& guess, int64_t row, int64_t column, int64_t* w) {
    const int64_t* text = guess.sequences + row * guess.width;  // [width]
    const int64_t last = std::min(guess.generated[row], guess.end) - 1;
    int64_t place = column + 1;
    for (int64_t i = 1; i < guess.n; ++i) {
        w[i] = text[place];
        place = place == last ? column + 1 : place + 1;
    }
}

// w [n] holds the window's own tokens, and in the end the pool's chain behind the first.
inline void from_pool(const GuessWindow& guess, int64_t row, int64_t* w) {
    const int64_t* latest = guess.latest + row * guess.vocabulary;  // [vocabulary]
    for (int64_t i = 1; i < guess.n; ++i) {
        const int64_t token = w[i - 1];
        if (token < 0 || token >= guess.vocabulary) continue;
        const int64_t pair = latest[token];
        if (pair >= 0) w[i] = pair % guess.vocabulary;
    }
}

// Counts what the text has become since the row's proposals were made for or against each.
inline void learn(const GuessWindow& guess, int64_t row) {
    const int64_t since = guess.since[row];
    if (since < 0) return;
    const int64_t end = std::min(guess.generated[row], guess.end);
    const int64_t known = std::min(end - since, guess.n - 1);
    if (known <= 0) return;
    const int64_t* truth = guess.sequences + row * guess.width + since;  // [known]
    const int64_t kinds = 2 + guess.longest;
    for (int64_t source = 0; source < kNone; ++source) {
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

// Learns from the row's proposals, then makes new ones; `text` is where its end was found again.
inline void propose(const GuessWindow& guess, int64_t row, Occurrence text) {
    learn(guess, row);
    const int64_t* w = guess.window + row * guess.n;     // [n]
    int64_t* made = guess.proposed + row * 3 * guess.n;  // [3, n]
    for (int64_t source = 0; source < kNone; ++source)
        std::copy(w, w + guess.n, made + source * guess.n);
    if (guess.latest != nullptr) from_pool(guess, row, made + kPool * guess.n);
    if (text.run > 0) follow(guess, row, text.column, made + kText * guess.n);
    made[0] = 0;
    made[kPool * guess.n] = guess.latest != nullptr ? 1 : -1;
    made[kText * guess.n] = text.run > 0 ? 1 + text.run : -1;
    guess.since[row] = guess.generated[row];
}

// The source, but for `without`, whose proposal's kind has most right guesses to a wrong one, the
// last of equals; kNone where no other proposes anything.
inline Source best_source(const GuessWindow& guess, int64_t row, Source without) {
    const int64_t* made = guess.proposed + row * 3 * guess.n;          // [3, n]
    const int64_t* odds = guess.odds + row * (2 + guess.longest) * 2;  // [2 + longest, 2]
    Source best = kNone;
    for (const Source source : {kOwn, kPool, kText}) {
        const int64_t kind = made[source * guess.n];
        if (source == without || kind < 0) continue;
        const int64_t* mine = odds + kind * 2;
        const int64_t* its = best == kNone ? mine : odds + made[best * guess.n] * 2;
        if (mine[0] * its[1] >= its[0] * mine[1]) best = source;
    }
    return best;
}

// Threads worth waking for `tokens` looked at or written: one takes a fraction of a nanosecond,
// waking a thread takes microseconds.
inline int guess_workers(int64_t tokens, int threads) {
    constexpr int64_t kTokensPerThread = 1 << 15;
    return static_cast<int>(std::min<int64_t>(threads, tokens / kTokensPerThread + 1));
}

}  // namespace cllm
