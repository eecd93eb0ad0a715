"""An iteration over several candidates: windows for the same places, of which the longest right one
counts."""

from __future__ import annotations

from typing import Any

import torch

from .loop import HostView, WindowIteration
from .predict import columns_from


class CandidateIteration(WindowIteration):
    """An iteration that feeds several windows in one forward and keeps the best.

    The candidates are a tree (SpecInfer, Miao et al. 2024, arXiv 2305.09781) that branches behind
    the last committed token. They are what followed the text's end where it stood before, each time
    with another next token; what the pool says; and the predictions that were left over: the first
    of them, in this order, whose first guesses differ. With `odds` the latest of what followed, the
    pool's and the left-over predictions come by how often each was right, before the rest.

    Args:
        candidates: C, at least 2.
        others: those of `WindowIteration`; in sliding mode.
    """

    def __init__(self, *args: Any, candidates: int, **others: Any):
        super().__init__(*args, **others)
        self.candidates = candidates

    def run(self, host: HostView) -> list[torch.Tensor]:
        """As `WindowIteration.run`; what is recorded is the window that was kept."""
        state, config = self.state, self.config
        windows = self._candidates(host.end)
        predictions, drafted = self._forward(windows, host)
        best = longest_right(windows, predictions)
        window, kept = taken(windows, best), taken(predictions, best)
        guesses = None if drafted is None else taken(drafted, best)
        if self.pool is not None:
            self.pool.add(windows.flatten(1), predictions.flatten(1))
            self.pool.add(window, kept)  # what stands behind wrong guesses says less
        recorded = []
        if config.record_trajectories:
            recorded = [part for part in (window.clone(), kept, guesses) if part is not None]
        self.forward.keep(state.lengths, best, window.shape[1])
        self._step(window, kept, guesses)
        return recorded

    def _forward(
        self, windows: torch.Tensor, host: HostView
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predictions behind the tokens of all candidates [B, C, n], and an adapter's, if there
        is one."""
        given = self.forward.candidate_windows(windows, self.state.lengths, host.lengths)
        return self._predictions(given, windows, host), None

    def _step(self, window: torch.Tensor, kept: torch.Tensor, guesses: torch.Tensor | None) -> None:
        """Commit what is final of the best candidate [B, n] by its predictions, and make the next
        window."""
        self.state.window.copy_(window)
        self.state.step(kept, self.config)

    def _candidates(self, end: int) -> torch.Tensor:
        """[B, C, n]: windows that begin with the last committed token."""
        state, window = self.state, self.state.window
        own, count = window[:, None, 1:], self.candidates
        if self.lookup is None:  # copies, so that there are enough
            found = own.expand(-1, count, -1)
            enough = torch.zeros_like(found[:, :, 0], dtype=torch.bool)
        else:
            found, enough = self.lookup.several(
                window, state.sequences, state.generated, end, count
            )
        if self.odds is not None:
            # what it counts and proposes is wanted; the window it makes is one of the ranked
            self._improve(window.clone(memory_format=torch.contiguous_format), end)
            ranked, there = self.odds.ranked(text=found[:, 0])
            sources, usable = [ranked, found[:, 1:]], [there, enough[:, 1:]]
        else:
            rest = [own] if self.pool is None else [self.pool.improved(window)[:, None, 1:], own]
            sources = [found, *rest]
            usable = [enough, torch.ones_like(enough[:, : len(rest)])]
        guesses = chosen(torch.cat(sources, dim=1), torch.cat(usable, dim=1), self.candidates)
        first = window[:, None, :1].expand(-1, self.candidates, -1)
        return torch.cat([first, guesses], dim=2)

    def _predictions(
        self, given: torch.Tensor, windows: torch.Tensor, host: HostView
    ) -> torch.Tensor:
        """[B, C, n] from what the forward gives, [B, C, n, V or H]; of any number of windows."""
        count, width = windows.shape[1:]
        columns = self._columns()
        if self.predictor.needs_prefixes:
            found = [
                self.predictor.tokens(
                    given[:, number],
                    windows[:, number].contiguous(),
                    self.state.sequences,
                    columns,
                    host.starts,
                )
                for number in range(count)
            ]
            return torch.stack(found, dim=1)
        places = self._places(count, width)
        return self.predictor.guesses(given.flatten(1, 2), places).view(windows.shape)

    def _places(self, count: int, width: int) -> torch.Tensor | None:
        """[B, count * width] columns of the output that the tokens behind so many windows are for;
        None where those do not count."""
        columns = self._columns()
        return None if columns is None else columns_from(columns, width).repeat(1, count)


def chosen(
    guesses: torch.Tensor, usable: torch.Tensor, count: int, always: int = 0
) -> torch.Tensor:
    """The first `count` guesses that are usable and do not begin as an earlier one does; behind
    them what is left of the usable ones, and of all.

    Args:
        guesses: [B, S, m], the best first; S at least `count`.
        usable: [B, S] bool.
        always: the first so many are taken in any case.

    Returns:
        [B, count, m].
    """
    first = guesses[:, :, 0]
    places = torch.arange(first.shape[1], device=first.device)
    earlier = places < places[:, None]
    same = (first[:, :, None] == first[:, None, :]) & usable[:, None, :] & earlier
    rank = torch.where(same.any(dim=2), 1, 0).masked_fill(~usable, 2)  # [B, S]
    rank = rank.masked_fill(places < always, 0)
    # stable, without asking a sort to be
    order = (rank * first.shape[1] + places).argsort(dim=1)[:, :count]
    return guesses.gather(1, order[:, :, None].expand(-1, -1, guesses.shape[2]))


def longest_right(windows: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    """[B]: which of the candidates [B, C, n] has the most right guesses, the first of equals."""
    right = windows[:, :, 1:] == predictions[:, :, :-1]
    length = right.long().cumprod(dim=2).sum(dim=2)
    count = windows.shape[1]
    return (length * count - torch.arange(count, device=length.device)).argmax(dim=1)


def taken(tokens: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """[B, n] of [B, C, n], that of every row's candidate [B]; contiguous."""
    index = candidate[:, None, None].expand(-1, 1, tokens.shape[2])
    return tokens.gather(1, index)[:, 0].contiguous()
