// The window behind a step, with an adapter's guesses, on the CPU:
// cllm_kernels/draft_window/reference.py says what it computes.
#include <algorithm>

#include "ops.h"

namespace cllm {

void draft_window_cpu(const DraftWindow& draft) {
    const int64_t n = draft.n;
    for (int64_t row = 0; row < draft.rows; ++row) {
        int64_t* w = draft.window + row * n;                                 // [n]
        const int64_t* checked = draft.checked + row * draft.checked_width;  // [checked_width]
        const int64_t* guesses = draft.guesses + row * n;                    // [n]
        if (draft.progress != nullptr) {
            const int64_t exact = draft.progress[row];
            const int64_t kept = exact > 0 ? std::min(exact + 1, n) : n;
            std::copy(checked, checked + kept, w);
            std::copy(guesses + kept - 1, guesses + n - 1, w + kept);
            continue;
        }
        w[0] = checked[0];
        for (int64_t i = 1; i < n; ++i) {
            const int64_t source = std::max<int64_t>(draft.accepted[row] - 1 + i, 0);
            if (source < n || draft.fill == nullptr) {
                w[i] = guesses[std::min(source, n - 1)];
                continue;
            }
            const int64_t place = std::max<int64_t>(draft.generated[row] - 1 + i, 0);
            w[i] = draft.fill[row * draft.fill_width + std::min(place, draft.fill_width - 1)];
        }
    }
}

}  // namespace cllm
