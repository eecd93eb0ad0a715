"""The decoding loop: forward, predict, step, one readback; until every row is done.

What an iteration does on the device (`WindowIteration`) stands apart from what the host has to do
with it (`DecodingLoop`), so that a graph can hold the one and the other can lag behind.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

import cllm_kernels

from ..trajectory import Iteration, Trajectory
from .config import JacobiConfig
from .forward import BlockForward
from .lookup import Lookup
from .odds import GuessOdds
from .pool import GuessPool
from .predict import Predictor
from .stopping import StopRules


@dataclass
class WindowState:
    """All that a row is, on the device and of fixed shape, so that a graph can carry it.

    Attributes:
        sequences: [B, L] padded prompts, then committed tokens, then padding.
        window: [B, n] what the next forward is fed.
        lengths: [B] tokens in the KV cache.
        generated: [B] filled tokens of `sequences`, the padded prompt included.
        progress: [B] predictions of the current block that are committed already (block mode).
        done: [B] bool.
        limits: [B] most tokens of `sequences` a row may fill.
        stop_ids: [S] token ids that end a row.
        fill: [B, L + n] guess for every position of `sequences`, or None: repeat the last.
    """

    sequences: torch.Tensor
    window: torch.Tensor
    lengths: torch.Tensor
    generated: torch.Tensor
    progress: torch.Tensor
    done: torch.Tensor
    limits: torch.Tensor
    stop_ids: torch.Tensor
    fill: torch.Tensor | None

    @classmethod
    def start(
        cls,
        prompts: torch.Tensor,
        prompt_lengths: torch.Tensor,
        sequences: torch.Tensor,
        prompt_width: int,
        fill: torch.Tensor | None,
        stop_ids: list[int],
        block_size: int,
    ) -> WindowState:
        """The state before the first forward: the window begins with the prompt's last token.

        Args:
            prompts: [B, P] right-padded, `prompt_lengths` [B].
            sequences: [B, L] with the (left-padded) prompts in its first `prompt_width` columns.
        """
        batch, device = prompts.shape[0], prompts.device
        last = prompts.gather(1, prompt_lengths[:, None] - 1)
        if fill is None:
            guesses = last.expand(batch, block_size - 1)
        else:
            guesses = fill[:, prompt_width : prompt_width + block_size - 1]
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(
            sequences=sequences,
            window=torch.cat([last, guesses], dim=1).contiguous(),
            lengths=prompt_lengths - 1,
            generated=zeros + prompt_width,
            progress=zeros.clone(),
            done=zeros.bool(),
            limits=zeros + sequences.shape[1],
            stop_ids=torch.tensor(stop_ids, dtype=torch.long, device=device),
            fill=fill,
        )

    def step(
        self, predictions: torch.Tensor, config: JacobiConfig, window: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Commit what `predictions` [B, n] makes final of `window` [B, n] (None: the state's),
        which becomes the next one; returns accepted [B]."""
        return cllm_kernels.jacobi_step(
            self.window if window is None else window,
            predictions,
            self.sequences,
            self.lengths,
            self.generated,
            self.progress,
            self.done,
            self.limits,
            self.stop_ids,
            self.fill,
            mode=config.mode,
            accept=config.accept,
        )

    def report(self) -> torch.Tensor:
        """[B, 4] int64: `generated`, `lengths`, `progress` and `done`, all that the host needs."""
        done = self.done.long()
        return torch.stack([self.generated, self.lengths, self.progress, done], dim=1)


class HostView(NamedTuple):
    """What the host knows of the rows before an iteration.

    Attributes:
        lengths: tokens of each row in the cache.
        starts: column of the output that the token behind each window's first is for; -1: the row
            has ended.
        end: no row's text goes beyond this column.
    """

    lengths: list[int]
    starts: list[int]
    end: int


class WindowIteration:
    """One iteration on the device: nothing is read back, and the state changes in place.

    Attributes:
        verify: tokens of a window that are checked, where that is not all of it.

    Args:
        forward: the prefilled block forward.
        state: the rows.
        lookup, pool: where guesses come from beside the predictions; None: from nowhere.
        odds: choose between these sources by how often each was right; None: they come in order.
        predictor: makes tokens of what `forward` gives; None: by a plain argmax.
    """

    verify: int | None = None

    def __init__(
        self,
        forward: BlockForward,
        state: WindowState,
        config: JacobiConfig,
        *,
        lookup: Lookup | None = None,
        pool: GuessPool | None = None,
        odds: GuessOdds | None = None,
        predictor: Predictor | None = None,
    ):
        self.forward = forward
        self.state = state
        self.config = config
        self.lookup = lookup
        self.pool = pool
        self.odds = odds
        self.predictor = predictor or Predictor()

    def run(self, host: HostView) -> list[torch.Tensor]:
        """Improve the window, feed it, commit what is final; the next window is in the state then.

        Returns:
            What trajectories record of it, each of B rows: the window that was fed [B, n], the
            predictions of the tokens that were checked [B, v], and those of the guess rows [B, n]
            where there are some; nothing where nothing is recorded.
        """
        state, config = self.state, self.config
        self._improve(state.window, host.end)
        given = self.forward.window(state.window, state.lengths, host.lengths)
        predictions = self.predictor.tokens(
            given, state.window, state.sequences, self._columns(), host.starts
        )
        if self.pool is not None:
            self.pool.add(state.window, predictions)
        recorded = [state.window.clone(), predictions] if config.record_trajectories else []
        state.step(predictions, config)
        return recorded

    def _improve(self, window: torch.Tensor, end: int) -> None:
        """Better guesses for a window [B, n], in place: of text, pool and window from what has been
        right most often, or without odds from the first of them that says something."""
        sources = self._sources(end)
        if sources is not None:
            cllm_kernels.guess_window(window, **sources)

    def _sources(self, end: int) -> dict[str, Any] | None:
        """What `cllm_kernels.guess_window` and `guess_candidates` guess from; None where there is
        nothing."""
        pool, lookup, odds, state = self.pool, self.lookup, self.odds, self.state
        if pool is None and lookup is None:
            return None
        sources: dict[str, Any] = {"latest": None if pool is None else pool.latest}
        if lookup is not None:
            sources |= lookup.searched(state.sequences, state.generated, end)
        if odds is not None:
            sources |= odds.kept
            if lookup is None:  # what was right is in the text all the same
                text = dict(sequences=state.sequences, generated=state.generated)
                sources |= text | dict(starts=state.generated, longest=0, end=end)
        return sources

    def _columns(self) -> torch.Tensor | None:
        """[B] column of the output that the token behind each window's first is for; None where
        only its prediction counts, not its place."""
        if self.predictor.noise is None:
            return None
        return self.state.generated - self.state.progress


class HostRow:
    """What the host knows of one row after the latest readback."""

    def __init__(self, generated: int, length: int):
        self.generated = generated
        self.length = length
        self.progress = 0
        self.done = False
        self.stopped = False  # by a criterion that the host decides
        self.iterations = 0
        self.records: list[Iteration] = []


class DecodingLoop:
    """Runs the iterations of one call.

    Args:
        prompt_width: P, columns of the state's sequences that hold the (padded) prompts.
        streamer: told of accepted tokens as they come (batch of 1).
    """

    def __init__(
        self,
        iteration: WindowIteration,
        rules: StopRules,
        *,
        prompt_width: int,
        streamer: Any = None,
    ):
        self.iteration = iteration
        self.state = iteration.state
        self.config = iteration.config
        self.rules = rules
        self.prompt_width = prompt_width
        self.streamer = streamer
        self.rows = [HostRow(prompt_width, length) for length in self.state.lengths.tolist()]
        # (tokens that a row's forward committed, it ended the row) to how often
        self.runs: Counter[tuple[int, bool]] = Counter()
        self.forwards = 0
        self.seconds = 0.0

    def run(self) -> None:
        """Iterate until every row is done, time is up or `max_iterations` are spent."""
        started = time.perf_counter()
        while not all(row.done for row in self.rows):
            if self.forwards == self.config.max_iterations:
                break
            self._iterate()
            if self.rules.per_iteration and self.rules.out_of_time(self.state.sequences):
                break
        self._finish()
        self.seconds += time.perf_counter() - started
        if self.streamer is not None:
            self.streamer.end()

    def _iterate(self) -> None:
        rows = self.rows
        view = HostView(
            lengths=[row.length for row in rows],
            starts=[-1 if row.done else row.generated - row.progress for row in rows],
            end=max(row.generated for row in rows),
        )
        recorded = self.iteration.run(view)
        self.forwards += 1
        parts = [self.state.report(), *recorded]
        # the iteration's one transfer to the host
        table = torch.cat(parts, dim=1).tolist()
        self._take(table, [part.shape[1] for part in parts])

    def _finish(self) -> None:
        """Called behind the last iteration."""

    def _take(self, table: list[list[int]], widths: list[int]) -> None:
        """What the host has to do with an iteration.

        Args:
            table: of every row its report, and behind it what is recorded of it, if anything is.
            widths: of the parts of such a row.
        """
        ends = list(accumulate(widths))
        for index, values in enumerate(table):
            row = self.rows[index]
            if row.done:
                continue
            generated, length, progress, done = values[:4]
            kept = self._host_stop(index, row.generated, generated)
            accepted = generated - row.generated if kept is None else kept
            row.iterations += 1
            if len(ends) > 1:
                fields = [values[start:end] for start, end in pairwise(ends)]
                row.records.append(self._record(row, accepted, *fields))
            if self.streamer is not None and accepted:
                start = row.generated
                self.streamer.put(self.state.sequences[index, start : start + accepted].cpu())
            row.generated += accepted
            row.length, row.progress = length, progress
            row.stopped = kept is not None
            row.done = bool(done) or row.stopped
            self.runs[accepted, row.done] += 1

    def _host_stop(self, index: int, start: int, end: int) -> int | None:
        if end == start:
            return None
        kept = self.rules.first_stop(self.state.sequences[index], start, end)
        if kept is not None:
            self.state.done[index] = True
            self.state.generated[index] = start + kept
        return kept

    def _record(
        self,
        row: HostRow,
        accepted: int,
        window: list[int],
        predictions: list[int],
        guesses: list[int] | None = None,
    ) -> Iteration:
        exact = row.progress + 1
        while (
            self.config.accept == "all"
            and exact < len(predictions)
            and window[exact] == predictions[exact - 1]
        ):
            exact += 1
        if guesses is not None:  # the draft behind what was checked is theirs
            predictions = predictions[:exact] + guesses[exact:]
        return Iteration(
            position=row.generated - row.progress - self.prompt_width,
            window=window,
            predictions=predictions,
            exact=exact,
            accepted=accepted,
        )

    def trajectories(self, prompts: list[list[int]]) -> list[Trajectory]:
        """One record a row; `prompts` are the rows' prompts without padding."""
        sequences = self.state.sequences.tolist()
        return [
            Trajectory(
                prompt=prompt,
                tokens=sequence[self.prompt_width : row.generated],
                iterations=row.records,
                block_size=self.config.width,
                mode=self.config.mode,
            )
            for row, prompt, sequence in zip(self.rows, prompts, sequences, strict=True)
        ]
