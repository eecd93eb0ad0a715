"""An iteration over several candidates: windows for the same places, of which the longest right one
counts."""

from __future__ import annotations

from typing import Any

import torch

import cllm_kernels

from .loop import HostView, WindowIteration
from .predict import columns_from


class CandidateIteration(WindowIteration):
    """An iteration that feeds several windows in one forward and keeps the best.

    The candidates are a tree (SpecInfer, Miao et al. 2024, arXiv 2305.09781) that branches behind
    the last committed token: `cllm_kernels.guess_candidates` says which.

    Args:
        candidates: C, at least 2.
        others: those of `WindowIteration`; in sliding mode.
    """

    own_second = False  # whether the window's own guesses are a candidate in any case

    def __init__(self, *args: Any, candidates: int, **others: Any):
        super().__init__(*args, **others)
        self.candidates = candidates

    def run(self, host: HostView) -> list[torch.Tensor]:
        """As `WindowIteration.run`; what is recorded is the window that was kept."""
        state, config = self.state, self.config
        windows = self._candidates(host.end)
        predictions, drafted = self._forward(windows, host)
        best, window, kept, guesses = cllm_kernels.best_candidate(windows, predictions, drafted)
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
        window, sources = self.state.window, self._sources(end)
        if sources is None:
            return window[:, None].repeat(1, self.candidates, 1)
        return cllm_kernels.guess_candidates(
            window, self.candidates, own_second=self.own_second, **sources
        )

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
