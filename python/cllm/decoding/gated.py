"""An iteration with an adapter: verify rows decide, guess rows propose."""

from __future__ import annotations

from typing import Any

import torch

import cllm_kernels

from ..adapter import Gate
from .candidates import CandidateIteration
from .config import JacobiConfig
from .loop import HostView, WindowIteration, WindowState
from .predict import columns_from


class GatedIteration(WindowIteration):
    """An iteration whose guesses an adapter makes.

    Args:
        gate: of `GatedAdapter.applied`, around the model of `forward`.
        others: those of `WindowIteration`; the window of `state` has ``n = config.block_size``
            tokens.
    """

    def __init__(self, *args: Any, gate: Gate, **others: Any):
        super().__init__(*args, **others)
        self.gate = gate
        self.verify = self.config.verify_size or self.config.width

    def run(self, host: HostView) -> list[torch.Tensor]:
        """As `WindowIteration.run`."""
        state, config = self.state, self.config
        verify = config.verify_size or config.width
        window = state.window
        self._improve(window, host.end)
        batch, width = window.shape
        with self.gate.open(verify, batch, verify + width):
            logits = self.forward.gated_window(window, verify, state.lengths, host.lengths)
        columns = self._columns()
        checked = window[:, :verify].clone(memory_format=torch.contiguous_format)
        if self.predictor.needs_prefixes:
            predictions = self.predictor.tokens(
                logits[:, :verify], checked, state.sequences, columns, host.starts
            )
            places = None if columns is None else columns_from(columns, width)
            guesses = self.predictor.guesses(logits[:, verify:], places)
        else:
            if columns is not None:
                parts = [columns_from(columns, count) for count in (verify, width)]
                columns = torch.cat(parts, dim=1)
            drafted = self.predictor.guesses(logits, columns)
            predictions, guesses = drafted[:, :verify].contiguous(), drafted[:, verify:]
        if self.pool is not None:
            self.pool.add(checked, predictions)
        recorded = [window.clone(), predictions, guesses] if config.record_trajectories else []
        advance(state, config, checked, predictions, guesses)
        return recorded


class GatedCandidateIteration(CandidateIteration):
    """An iteration over several candidates, each of which an adapter goes on from.

    The adapter's guesses are one of the first two: text and pool know the text, the adapter knows
    the model. Every candidate stands twice, first among those that are checked, then among guess
    rows; the guess rows of the best make the next guesses.

    Args:
        gate: as in `GatedIteration`.
        others: those of `CandidateIteration`.
    """

    own_second = True

    def __init__(self, *args: Any, gate: Gate, **others: Any):
        super().__init__(*args, **others)
        self.gate = gate
        self.verify = self.config.width

    def _forward(
        self, windows: torch.Tensor, host: HostView
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, count, width = windows.shape
        twice = windows.repeat(1, 2, 1)
        with self.gate.open(count * width, batch, 2 * count * width):
            given = self.forward.candidate_windows(
                twice, self.state.lengths, host.lengths, checked=count
            )
        if not self.predictor.needs_prefixes:
            drafted = self._predictions(given, twice, host)
            return drafted[:, :count].contiguous(), drafted[:, count:].contiguous()
        places = self._places(count, width)
        guesses = self.predictor.guesses(given[:, count:].flatten(1, 2), places)
        return self._predictions(given[:, :count], windows, host), guesses.view(windows.shape)

    def _step(self, window: torch.Tensor, kept: torch.Tensor, guesses: torch.Tensor | None) -> None:
        assert guesses is not None
        advance(self.state, self.config, window, kept, guesses)


def advance(
    state: WindowState,
    config: JacobiConfig,
    checked: torch.Tensor,
    predictions: torch.Tensor,
    guesses: torch.Tensor,
) -> None:
    """Commit what is final, and put the adapter's guesses into the next window.

    Args:
        checked: [B, v] the window's tokens that were checked; they are overwritten.
        predictions: [B, v] behind them.
        guesses: [B, n] predictions of the guess rows.
    """
    accepted = state.step(predictions, config, checked)
    cllm_kernels.draft_window(
        state.window,
        checked,
        guesses.contiguous(),
        accepted,
        state.generated,
        progress=state.progress if config.mode == "block" else None,
        fill=state.fill,
    )
