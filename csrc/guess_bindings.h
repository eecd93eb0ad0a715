// What bindings.cpp adds for guesses: as there, addresses and sizes come in as integers.
#pragma once

#include <pybind11/pybind11.h>

#include "ops.h"

namespace cllm {

inline GuessWindow guess_window(uintptr_t window, uintptr_t latest, uintptr_t sequences,
                                uintptr_t generated, uintptr_t starts, int64_t rows, int64_t n,
                                int64_t vocabulary, int64_t width, int64_t longest, int64_t least,
                                int64_t end, uintptr_t odds, uintptr_t proposed, uintptr_t since) {
    return {reinterpret_cast<int64_t*>(window),
            reinterpret_cast<const int64_t*>(latest),
            reinterpret_cast<const int64_t*>(sequences),
            reinterpret_cast<const int64_t*>(generated),
            reinterpret_cast<const int64_t*>(starts),
            rows,
            n,
            vocabulary,
            width,
            longest,
            least,
            end,
            reinterpret_cast<int64_t*>(odds),
            reinterpret_cast<int64_t*>(proposed),
            reinterpret_cast<int64_t*>(since)};
}

inline void bind_guesses(pybind11::module_& module) {
    module.def("guess_window_cpu",
               [](uintptr_t window, uintptr_t latest, uintptr_t sequences, uintptr_t generated,
                  uintptr_t starts, int64_t rows, int64_t n, int64_t vocabulary, int64_t width,
                  int64_t longest, int64_t least, int64_t end, uintptr_t odds, uintptr_t proposed,
                  uintptr_t since, int threads) {
                   const GuessWindow guess =
                       guess_window(window, latest, sequences, generated, starts, rows, n,
                                    vocabulary, width, longest, least, end, odds, proposed, since);
                   pybind11::gil_scoped_release release;
                   guess_window_cpu(guess, threads);
               });
    module.def(
        "guess_candidates_cpu",
        [](uintptr_t windows, int64_t count, bool own_second, uintptr_t window, uintptr_t latest,
           uintptr_t sequences, uintptr_t generated, uintptr_t starts, int64_t rows, int64_t n,
           int64_t vocabulary, int64_t width, int64_t longest, int64_t least, int64_t end,
           uintptr_t odds, uintptr_t proposed, uintptr_t since, int threads) {
            const GuessCandidates all{
                guess_window(window, latest, sequences, generated, starts, rows, n, vocabulary,
                             width, longest, least, end, odds, proposed, since),
                reinterpret_cast<int64_t*>(windows), count, own_second};
            pybind11::gil_scoped_release release;
            guess_candidates_cpu(all, threads);
        });
    module.def("best_candidate_cpu",
               [](uintptr_t windows, uintptr_t predictions, uintptr_t guesses, uintptr_t candidate,
                  uintptr_t kept, int64_t rows, int64_t count, int64_t n) {
                   const BestCandidate of{reinterpret_cast<const int64_t*>(windows),
                                          reinterpret_cast<const int64_t*>(predictions),
                                          reinterpret_cast<const int64_t*>(guesses),
                                          reinterpret_cast<int64_t*>(candidate),
                                          reinterpret_cast<int64_t*>(kept),
                                          rows,
                                          count,
                                          n};
                   pybind11::gil_scoped_release release;
                   best_candidate_cpu(of);
               });
    module.def("draft_window_cpu",
               [](uintptr_t window, uintptr_t checked, uintptr_t guesses, uintptr_t accepted,
                  uintptr_t generated, uintptr_t progress, uintptr_t fill, int64_t rows, int64_t n,
                  int64_t checked_width, int64_t fill_width) {
                   const DraftWindow draft{reinterpret_cast<int64_t*>(window),
                                           reinterpret_cast<const int64_t*>(checked),
                                           reinterpret_cast<const int64_t*>(guesses),
                                           reinterpret_cast<const int64_t*>(accepted),
                                           reinterpret_cast<const int64_t*>(generated),
                                           reinterpret_cast<const int64_t*>(progress),
                                           reinterpret_cast<const int64_t*>(fill),
                                           rows,
                                           n,
                                           checked_width,
                                           fill_width};
                   pybind11::gil_scoped_release release;
                   draft_window_cpu(draft);
               });
    module.def("guess_pool_add_cpu",
               [](uintptr_t latest, uintptr_t stamps, uintptr_t window, uintptr_t predictions,
                  int64_t rows, int64_t n, int64_t vocabulary) {
                   const GuessPoolAdd add{reinterpret_cast<int64_t*>(latest),
                                          reinterpret_cast<int64_t*>(stamps),
                                          reinterpret_cast<const int64_t*>(window),
                                          reinterpret_cast<const int64_t*>(predictions),
                                          rows,
                                          n,
                                          vocabulary};
                   pybind11::gil_scoped_release release;
                   guess_pool_add_cpu(add);
               });
}

}  // namespace cllm
