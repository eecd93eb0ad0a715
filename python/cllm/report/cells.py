"""The grid behind every form of the report: one row an iteration, one cell a drafted token.

This is figure 7 of CLLM (arXiv 2403.00835) as plain data. The terminal, the PNG and the HTML page
draw it; none of them decides what a cell means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ..trajectory import Iteration, Trajectory
from .text import visible

State = Literal["fixed", "right", "wrong"]


class ReportError(ValueError):
    """A trajectory that cannot be drawn; the message says which one and why."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one forward pass said about one position of the generated text.

    Attributes:
        position: index in the generated text, from 0.
        token: the token id that stands there after this iteration.
        piece: that token as visible text (`cllm.report.text.visible`).
        state: ``"fixed"``: final. ``"right"``: a guess equal to the final token, not known to be
            right yet. ``"wrong"``: a guess that will change.
        fast_forwarded: this iteration made the token final, and another one before it as well: a
            token that cost no forward pass of its own.
        stationary: a right guess behind a wrong one that no later iteration changed.
        fixed_at: the iteration (from 1) that made the final token at this position final.
    """

    position: int
    token: int
    piece: str
    state: State
    fast_forwarded: bool
    stationary: bool
    fixed_at: int


@dataclass(frozen=True, slots=True)
class Row:
    """The draft after one iteration; row 0 is the initial guess, before any forward pass.

    Attributes:
        iteration: 0 for the initial guess, then 1, 2, ...
        position: position of the first cell; cells follow without gaps.
        committed: how many tokens of the text are final after this iteration.
        accepted: how many of them this iteration added.
        cells: the window of this iteration, cut at the end of the text. Positions outside it have
            no cell: before it everything is final, behind it nothing is drafted yet.
    """

    iteration: int
    position: int
    committed: int
    accepted: int
    cells: tuple[Cell, ...]

    @property
    def end(self) -> int:
        """One past the position of the last cell."""
        return self.position + len(self.cells)

    @property
    def fast_forwarded(self) -> int:
        """Tokens of this row that are marked as fast-forwarded."""
        return sum(cell.fast_forwarded for cell in self.cells)

    @property
    def stationary(self) -> int:
        """Tokens of this row that are marked as stationary."""
        return sum(cell.stationary for cell in self.cells)

    def at(self, position: int) -> Cell | None:
        """The cell at a position of the generated text, or None outside the window."""
        if self.position <= position < self.end:
            return self.cells[position - self.position]
        return None


@dataclass(frozen=True, slots=True)
class Totals:
    """The numbers at the head of a report.

    ``stationary`` counts each position once, however many iterations it waited for.
    """

    tokens: int
    iterations: int
    tokens_per_forward: float
    fast_forwarded: int
    stationary: int
    block_size: int
    mode: str


@dataclass(frozen=True)
class Grid:
    """A whole trajectory: rows 0 (the initial guess) to ``totals.iterations``."""

    rows: tuple[Row, ...]
    tokens: tuple[int, ...]
    fixed_at: tuple[int, ...]
    totals: Totals
    pieces: dict[int, str]
    prompt_text: str | None

    @property
    def columns(self) -> int:
        """Width of the grid: one column a generated token."""
        return len(self.tokens)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, row by row."""
        return tuple(cell for row in self.rows for cell in row.cells)

    def rows_touching(self, start: int, stop: int) -> Iterator[Row]:
        """The rows that have a cell in the columns ``start`` to ``stop - 1``."""
        return (row for row in self.rows if row.position < stop and row.end > start and row.cells)


def build_grid(trajectory: Trajectory) -> Grid:
    """Lay a trajectory out as rows of cells.

    Drafts past the end of the generated text are left out: they have no final token to be compared
    with.

    Raises:
        ReportError: if nothing was recorded or generated, or if the record contradicts itself.
    """
    if not trajectory.iterations:
        raise ReportError(
            "the trajectory has no iterations: record it with record_trajectories=True"
        )
    if not trajectory.tokens:
        raise ReportError("the trajectory has no tokens: nothing was generated, nothing to draw")
    fixed_at = _fixed_at(trajectory)
    stationary_from = _stationary_from(trajectory)
    pieces = _pieces(trajectory)
    rows = [_initial_row(trajectory, fixed_at, pieces)]
    committed = 0
    for number, iteration in enumerate(trajectory.iterations, start=1):
        rows.append(
            _row(trajectory, number, iteration, committed, fixed_at, stationary_from, pieces)
        )
        committed += iteration.accepted
    return Grid(
        rows=tuple(rows),
        tokens=tuple(trajectory.tokens),
        fixed_at=tuple(fixed_at),
        totals=Totals(
            tokens=len(trajectory.tokens),
            iterations=len(trajectory.iterations),
            tokens_per_forward=trajectory.tokens_per_forward,
            fast_forwarded=sum(row.fast_forwarded for row in rows),
            stationary=len(
                {cell.position for row in rows for cell in row.cells if cell.stationary}
            ),
            block_size=trajectory.block_size,
            mode=trajectory.mode,
        ),
        pieces=trajectory.pieces or {},
        prompt_text=trajectory.prompt_text,
    )


def _fixed_at(trajectory: Trajectory) -> list[int]:
    """For each token the iteration (from 1) that committed it, checking the record on the way."""
    fixed_at: list[int] = []
    for number, iteration in enumerate(trajectory.iterations, start=1):
        start, end = len(fixed_at), len(fixed_at) + iteration.accepted
        if not 0 <= iteration.position <= start or iteration.accepted < 0:
            raise ReportError(
                f"iteration {number} starts at token {iteration.position}, but {start} tokens "
                "were final before it: the record is damaged"
            )
        drafted = iteration.predictions[start - iteration.position : end - iteration.position]
        if drafted != trajectory.tokens[start:end] or len(drafted) != iteration.accepted:
            raise ReportError(
                f"iteration {number} accepted {iteration.accepted} tokens from position {start} "
                "that are not the generated ones: the record is damaged"
            )
        fixed_at.extend([number] * iteration.accepted)
    if len(fixed_at) != len(trajectory.tokens):
        raise ReportError(
            f"the iterations accept {len(fixed_at)} tokens, but the trajectory has "
            f"{len(trajectory.tokens)}: the record is damaged"
        )
    return fixed_at


def _stationary_from(trajectory: Trajectory) -> list[int]:
    """For each token the first iteration (from 1) from which on every draft had it right."""
    right_from = [len(trajectory.iterations) + 1] * len(trajectory.tokens)
    changed = [False] * len(trajectory.tokens)
    for number in range(len(trajectory.iterations), 0, -1):
        iteration = trajectory.iterations[number - 1]
        for position, token in enumerate(iteration.predictions, start=iteration.position):
            if position >= len(trajectory.tokens):
                break
            if token != trajectory.tokens[position]:
                changed[position] = True
            elif not changed[position]:
                right_from[position] = number
    return right_from


def _pieces(trajectory: Trajectory) -> dict[int, str]:
    return {token: visible(text) for token, text in (trajectory.pieces or {}).items()}


def _initial_row(trajectory: Trajectory, fixed_at: list[int], pieces: dict[int, str]) -> Row:
    first = trajectory.iterations[0]
    cells = []
    for position, token in enumerate(first.window[1:], start=first.position):
        if position >= len(trajectory.tokens):
            break
        cells.append(
            Cell(
                position=position,
                token=token,
                piece=pieces.get(token, f"#{token}"),
                state="right" if token == trajectory.tokens[position] else "wrong",
                fast_forwarded=False,
                stationary=False,
                fixed_at=fixed_at[position],
            )
        )
    return Row(iteration=0, position=first.position, committed=0, accepted=0, cells=tuple(cells))


def _row(
    trajectory: Trajectory,
    number: int,
    iteration: Iteration,
    committed_before: int,
    fixed_at: list[int],
    stationary_from: list[int],
    pieces: dict[int, str],
) -> Row:
    committed = committed_before + iteration.accepted
    end = min(iteration.position + len(iteration.predictions), len(trajectory.tokens))
    wrong_before = False
    cells = []
    for position in range(iteration.position, end):
        final = trajectory.tokens[position]
        fixed = position < committed
        # What is final stays final: a kernel that rounds one position differently in a later pass
        # changes the draft of that pass, not the text.
        token = final if fixed else iteration.predictions[position - iteration.position]
        state: State = "fixed" if fixed else "right" if token == final else "wrong"
        cells.append(
            Cell(
                position=position,
                token=token,
                piece=pieces.get(token, f"#{token}"),
                state=state,
                fast_forwarded=committed_before < position < committed,
                stationary=(
                    state == "right" and wrong_before and stationary_from[position] <= number
                ),
                fixed_at=fixed_at[position],
            )
        )
        wrong_before = wrong_before or state == "wrong"
    return Row(
        iteration=number,
        position=iteration.position,
        committed=committed,
        accepted=iteration.accepted,
        cells=tuple(cells),
    )
