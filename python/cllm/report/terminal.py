"""A trajectory as coloured cells in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.text import Text

from ..trajectory import Trajectory
from .cells import Cell, Grid, Row, build_grid
from .palette import (
    FAST_FORWARDED,
    FAST_FORWARDED_MEANING,
    STATIONARY_MEANING,
    STYLES,
)

_WIDEST_PIECE = 10
_NARROWEST_PIECE = 2


@dataclass(frozen=True, slots=True)
class _Marks:
    """The sign in front of each token: the states must be readable without colour."""

    fixed: str
    right: str
    wrong: str
    fast_forwarded: str
    stationary: str
    ellipsis: str
    rule: str

    def of(self, cell: Cell) -> str:
        if cell.fast_forwarded:
            return self.fast_forwarded
        if cell.stationary:
            return self.stationary
        return {"fixed": self.fixed, "right": self.right, "wrong": self.wrong}[cell.state]


_UNICODE = _Marks(" ", "=", "\u00d7", "»", "•", "…", "│")
_ASCII = _Marks(" ", "=", "x", ">", "o", "~", "|")


@dataclass(frozen=True, slots=True)
class _Band:
    """Columns that fit next to each other, and the rows that have cells in them."""

    start: int
    stop: int
    widths: list[int]
    rows: list[Row]


def render_terminal(trajectory: Trajectory, *, first: int = 0, max_rows: int = 48) -> TerminalGrid:
    """A rich renderable of the trajectory: ``console.print(render_terminal(trajectory))``.

    The columns that fit the console's width are drawn first, with the iterations that touch them;
    the next columns follow below, until ``max_rows`` rows are out. What is left is counted in a
    closing line, never dropped in silence. Where the console has no Unicode, ASCII marks are used.

    Args:
        trajectory: what to draw.
        first: position in the generated text of the leftmost column.
        max_rows: the most grid rows to print (at least 1).

    Raises:
        ReportError: if the trajectory has no iterations or tokens.
        ValueError: if ``first`` or ``max_rows`` is out of range.
    """
    grid = build_grid(trajectory)
    if not 0 <= first < grid.columns:
        raise ValueError(
            f"first is {first}, but the text has the positions 0 to {grid.columns - 1}"
        )
    if max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}; at least one row must be printed")
    return TerminalGrid(grid, first, max_rows)


@dataclass(frozen=True)
class TerminalGrid:
    """The renderable that `render_terminal` returns; lays itself out for the console it meets."""

    grid: Grid
    first: int = 0
    max_rows: int = 48

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(20, options.max_width), options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marks = _ASCII if options.ascii_only else _UNICODE
        width = options.max_width
        yield from self._lines(width, marks, options.ascii_only)

    def _lines(self, width: int, marks: _Marks, ascii_only: bool) -> Iterator[Text]:
        yield from self._summary()
        yield from _legend(width, marks)
        gutter = len(str(self.grid.totals.iterations)) + 1
        rows_left, column, last = self.max_rows, self.first, -1
        while column < self.grid.columns and rows_left > 0:
            band = self._band(column, width - gutter - 1, ascii_only)
            yield Text()
            yield _header(band, gutter, width, marks)
            for row in band.rows[:rows_left]:
                yield _grid_line(row, band, gutter, width, marks, ascii_only)
                last = max(last, row.iteration)
            if len(band.rows) > rows_left:
                yield self._rest(column, last, marks)
                return
            rows_left -= len(band.rows)
            column = band.stop
        if column < self.grid.columns:
            yield self._rest(column, last, marks)

    def _summary(self) -> Iterator[Text]:
        totals = self.grid.totals
        yield Text.assemble(
            (f"{totals.tokens} tokens in {totals.iterations} iterations", "bold"),
            f": {totals.tokens_per_forward:.2f} tokens per forward",
        )
        yield Text(
            f"{totals.fast_forwarded} fast-forwarded, {totals.stationary} stationary; "
            f"{totals.mode} mode, block size {totals.block_size}"
        )

    def _rest(self, column: int, last: int, marks: _Marks) -> Text:
        tokens = self.grid.columns - column
        iterations = self.grid.totals.iterations - max(last, 0)
        return Text(
            f"{marks.ellipsis} cut here, {_count(tokens, 'token')} "
            f"and {_count(iterations, 'iteration')} before the end",
            style="dim",
        )

    def _band(self, start: int, room: int, ascii_only: bool) -> _Band:
        """As many columns from ``start`` on as fit into ``room`` console cells (at least one)."""
        widths: list[int] = []
        stop, used = start, 0
        while stop < self.grid.columns:
            pieces = [
                cell_len(_shown(cell.piece, ascii_only))
                for row in self.grid.rows
                if (cell := row.at(stop)) is not None
            ]
            widest = max([*pieces, len(str(stop)), _NARROWEST_PIECE])
            column = min(widest, _WIDEST_PIECE) + 2  # a mark before it, a gap behind it
            if widths and used + column > room:
                break
            widths.append(max(min(column, room), 2))
            used += widths[-1]
            stop += 1
        return _Band(start, stop, widths, list(self.grid.rows_touching(start, stop)))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shown(piece: str, ascii_only: bool) -> str:
    if not ascii_only:
        return piece
    plain = piece.translate({ord("·"): "_", ord("⏎"): "\\n", ord("⇥"): "\\t"})
    return plain.encode("ascii", "backslashreplace").decode("ascii")


def _header(band: _Band, gutter: int, width: int, marks: _Marks) -> Text:
    line = Text(" " * gutter + marks.rule, style="dim", no_wrap=True, end="")
    for offset, column in enumerate(band.widths):
        line.append(set_cell_size(f" {band.start + offset}", column))
    return _cut(line, width)


def _grid_line(
    row: Row, band: _Band, gutter: int, width: int, marks: _Marks, ascii_only: bool
) -> Text:
    line = Text(no_wrap=True, end="")
    line.append(f"{row.iteration:>{gutter - 1}} {marks.rule}", style="dim")
    for offset, column in enumerate(band.widths):
        cell = row.at(band.start + offset)
        if cell is None:
            line.append(" " * column)
            continue
        shown = _shown(cell.piece, ascii_only)
        if cell_len(shown) > column - 2:
            shown = set_cell_size(shown, max(column - 3, 0)) + marks.ellipsis
        look = STYLES[cell.state]
        base = Style(color=look.ink, bgcolor=look.fill, bold=cell.state == "fixed")
        mark = Style(color=FAST_FORWARDED, bold=True) if cell.fast_forwarded else Style(bold=True)
        line.append(marks.of(cell), style=base + mark)
        line.append(set_cell_size(shown, column - 2), style=base)
        line.append(" ")
    return _cut(line, width)


def _cut(line: Text, width: int) -> Text:
    line.truncate(width)
    line.end = "\n"
    return line


def _legend(width: int, marks: _Marks) -> Iterator[Text]:
    """The marks and what they mean, broken between entries."""
    entries = [
        (marks.fixed, "fixed", STYLES["fixed"].meaning),
        (marks.fast_forwarded, "fixed", FAST_FORWARDED_MEANING),
        (marks.right, "right", STYLES["right"].meaning),
        (marks.stationary, "right", STATIONARY_MEANING),
        (marks.wrong, "wrong", STYLES["wrong"].meaning),
    ]
    line = Text(end="")
    for mark, state, meaning in entries:
        look = STYLES[state]
        ink = FAST_FORWARDED if mark == marks.fast_forwarded else look.ink
        entry = Text.assemble(
            (f" {mark} ", Style(color=ink, bgcolor=look.fill, bold=True)), f" {meaning}"
        )
        if line and line.cell_len + 3 + entry.cell_len > width:
            yield _cut(line, width)
            line = Text(end="")
        if line:
            line.append("   ")
        line.append_text(entry)
    yield _cut(line, width)
