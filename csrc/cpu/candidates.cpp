// Candidates of a window, and the one that counts, on the CPU:
// cllm_kernels/guess_candidates/reference.py and cllm_kernels/best_candidate/reference.py say what
// is computed.
#include <initializer_list>
#include <vector>

#include "guess_sources.h"

namespace cllm {
namespace {

struct Guesses {
    const int64_t* tokens;  // [n], or null: those behind `column` of the text
    int64_t column;
    int64_t first;
    bool own;
    bool taken;
};

// Fills the candidates of one row at a time. All its memory is there from the start: what runs in
// several threads must not throw.
class Candidates {
  public:
    explicit Candidates(const GuessCandidates& all) : all_(all), chain_(all.guess.n) {
        const size_t most = all.count + 2;  // ways, the pool's chain and the window's own
        sources_.reserve(most);
        ways_.reserve(most);
        begun_.reserve(most);
    }

    void fill(int64_t row) {
        row_ = row;
        used_ = 0;
        list();
        begun_.clear();
        if (all_.own_second) {
            take(sources_.front());
            for (Guesses& one : sources_)
                if (one.own && !one.taken) take(one);
        }
        for (Guesses& one : sources_) {
            const bool same = std::find(begun_.begin(), begun_.end(), one.first) != begun_.end();
            if (!one.taken && !same) take(one);
        }
        for (Guesses& one : sources_)
            if (!one.taken) take(one);
        for (size_t way = enough_; way < ways_.size(); ++way) {
            Guesses short_end = behind(ways_[way]);
            take(short_end);
        }
        while (used_ < all_.count) take(own_);
    }

  private:
    // All that proposes something, the best first.
    void list() {
        const GuessWindow& guess = all_.guess;
        const int64_t* w = guess.window + row_ * guess.n;  // [n]
        own_ = {w, 0, w[1], true, false};
        const bool searched = guess.sequences != nullptr && guess.longest > 0;
        find_ways(searched ? all_.count : 0);
        sources_.clear();
        if (guess.odds != nullptr) {
            propose(guess, row_, enough_ > 0 ? ways_.front() : Occurrence{});
            const Source first = best_source(guess, row_, kNone);
            const Source second = best_source(guess, row_, first);
            for (const Source source : {first, second}) add(source);
            for (const Source source : {kOwn, kPool, kText})
                if (source != first && source != second) add(source);
            for (size_t way = 1; way < enough_; ++way) sources_.push_back(behind(ways_[way]));
            return;
        }
        for (size_t way = 0; way < enough_; ++way) sources_.push_back(behind(ways_[way]));
        if (guess.latest != nullptr) {
            std::copy(w, w + guess.n, chain_.begin());
            from_pool(guess, row_, chain_.data());
            sources_.push_back({chain_.data(), 0, chain_[1], false, false});
        }
        sources_.push_back(own_);
    }

    // Up to `most` places to go on from, behind each of which another token stands; those with
    // enough of the end before them are the first.
    void find_ways(int64_t most) {
        ways_.clear();
        begun_.clear();
        enough_ = 0;
        const int64_t* text = all_.guess.sequences + row_ * all_.guess.width;  // [width]
        while (static_cast<int64_t>(ways_.size()) < most) {
            const auto count = static_cast<int64_t>(begun_.size());
            const Occurrence way = find_end(all_.guess, row_, begun_.data(), count);
            if (way.run == 0) return;
            ways_.push_back(way);
            if (way.run >= all_.guess.least) enough_ = ways_.size();
            // Those behind one that is short are short, and taken where pool and window leave room.
            const int64_t room = most - 1 - (all_.guess.latest != nullptr);
            if (enough_ < ways_.size() && static_cast<int64_t>(ways_.size()) >= room) return;
            begun_.push_back(text[way.column + 1]);
        }
    }

    // One of the row's proposals, if there is one.
    void add(Source source) {
        if (source == kNone) return;
        const GuessWindow& guess = all_.guess;
        const int64_t* made = guess.proposed + (row_ * 3 + source) * guess.n;  // [n]
        if (made[0] >= 0) sources_.push_back({made, 0, made[1], source == kOwn, false});
    }

    Guesses behind(const Occurrence& way) const {
        const int64_t* text = all_.guess.sequences + row_ * all_.guess.width;  // [width]
        return {nullptr, way.column, text[way.column + 1], false, false};
    }

    // The next candidate, unless there are enough.
    void take(Guesses& one) {
        if (used_ == all_.count) return;
        const int64_t n = all_.guess.n;
        int64_t* w = all_.windows + (row_ * all_.count + used_) * n;  // [n]
        w[0] = all_.guess.window[row_ * n];
        if (one.tokens == nullptr) {
            follow(all_.guess, row_, one.column, w);
        } else {
            std::copy(one.tokens + 1, one.tokens + n, w + 1);
        }
        one.taken = true;
        begun_.push_back(one.first);
        ++used_;
    }

    const GuessCandidates& all_;
    int64_t row_ = 0;
    int64_t used_ = 0;  // candidates that are filled
    Guesses own_{};
    std::vector<Guesses> sources_;
    std::vector<Occurrence> ways_;
    size_t enough_ = 0;           // of them, with as much of the end before them as it takes
    std::vector<int64_t> begun_;  // tokens that a guess begins with
    std::vector<int64_t> chain_;  // [n]
};

}  // namespace

void guess_candidates_cpu(const GuessCandidates& all, int threads) {
    const GuessWindow& guess = all.guess;
    const int64_t looked_at = guess.rows * all.count * (guess.width + guess.n);
    const int workers = guess_workers(looked_at, threads);
    std::vector<Candidates> workspaces;  // a thread's each
    workspaces.reserve(workers);
    for (int worker = 0; worker < workers; ++worker) workspaces.emplace_back(all);
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
    for (int worker = 0; worker < workers; ++worker) {
        const int64_t end = guess.rows * (worker + 1) / workers;
        for (int64_t row = guess.rows * worker / workers; row < end; ++row) {
            if (guess.n > 1) {
                workspaces[worker].fill(row);
            } else {
                int64_t* windows = all.windows + row * all.count;  // [count, 1]
                std::fill(windows, windows + all.count, guess.window[row]);
            }
        }
    }
}

void best_candidate_cpu(const BestCandidate& of) {
    for (int64_t row = 0; row < of.rows; ++row) {
        int64_t best = 0, most = -1;
        for (int64_t one = 0; one < of.count; ++one) {
            const int64_t begin = (row * of.count + one) * of.n;
            const int64_t* window = of.windows + begin;           // [n]
            const int64_t* predictions = of.predictions + begin;  // [n]
            int64_t right = 0;
            while (right + 1 < of.n && window[right + 1] == predictions[right]) ++right;
            if (right > most) {
                most = right;
                best = one;
            }
        }
        of.candidate[row] = best;
        int64_t* kept = of.kept + row * of.n;  // [n] of every part
        for (const int64_t* part : {of.windows, of.predictions, of.guesses}) {
            if (part == nullptr) continue;
            const int64_t* its = part + (row * of.count + best) * of.n;  // [n]
            std::copy(its, its + of.n, kept);
            kept += of.rows * of.n;
        }
    }
}

}  // namespace cllm
