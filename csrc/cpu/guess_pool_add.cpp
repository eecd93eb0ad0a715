// Predictions kept for later guesses: cllm_kernels/guess_pool_add/reference.py says what it does.
#include <algorithm>

#include "ops.h"

namespace cllm {

void guess_pool_add_cpu(const GuessPoolAdd& add) {
    for (int64_t row = 0; row < add.rows; ++row) {
        int64_t* latest = add.latest + row * add.vocabulary;       // [vocabulary]
        const int64_t* w = add.window + row * add.n;               // [n]
        const int64_t* predicted = add.predictions + row * add.n;  // [n]
        const auto known = [&add](int64_t token) { return token >= 0 && token < add.vocabulary; };
        for (int64_t i = 0; i < add.n; ++i) {
            if (!known(w[i]) || !known(predicted[i])) continue;
            const int64_t pair = (add.stamps[row] + i) * add.vocabulary + predicted[i];
            latest[w[i]] = std::max(latest[w[i]], pair);
        }
        add.stamps[row] += add.n;
    }
}

}  // namespace cllm
