"""A trajectory as a PNG file, drawn by matplotlib without its global state."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.cells import cell_len, set_cell_size

from ..files import write_atomically
from ..trajectory import Trajectory
from .cells import Cell, Grid, ReportError, Row, build_grid
from .fonts import drawable, font
from .palette import (
    FAST_FORWARDED,
    STATIONARY,
    STYLES,
)
from .text import shorten

_DPI = 150
_MARGIN = 0.35
_HEAD = 1.5
_FOOT = 0.35
_NARROWEST = 9.0
_WIDEST_WITH_TEXT = 26.0
_WIDEST = 16.0
_TALLEST = 60.0
_TEXT_POINTS = 7.0
# Advance of one DejaVu Sans Mono character at _TEXT_POINTS, in inches.
_CHARACTER = 0.602 * _TEXT_POINTS / 72
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 3, 9
_TITLE_INK, _INK, _FAINT, _RULE = "#111827", "#374151", "#6b7280", "#d1d5db"

_Box = tuple[float, float, float, float]  # x, y, width, height


_TITLE = "Jacobi decoding: one row per iteration, one cell per token"


def write_png(
    trajectory: Trajectory | Sequence[Trajectory],
    path: str | os.PathLike[str],
    *,
    titles: Sequence[str] | None = None,
) -> Path:
    """Draw the grid of one trajectory, or those of several side by side, into a PNG file.

    Tokens are written into their cells where all columns with text fit into the picture; longer
    generations become a map of smaller cells. The file appears whole or not at all.

    Args:
        titles: what stands above each grid; by default the trajectories' own, or what a grid is.

    Returns:
        The path written.

    Raises:
        ReportError: if a trajectory has no iterations or tokens, or there is none, or not one title
            for each.
        OSError: if the file cannot be written.
    """
    trajectories = [trajectory] if isinstance(trajectory, Trajectory) else list(trajectory)
    titles = [one.title or _TITLE for one in trajectories] if titles is None else list(titles)
    if not trajectories or len(titles) != len(trajectories):
        raise ReportError(
            f"{len(trajectories)} trajectories with {len(titles)} titles: give at least one "
            "trajectory, and one title for each"
        )
    grids = [build_grid(one) for one in trajectories]
    buffer = io.BytesIO()
    _draw(grids, titles).print_png(buffer)
    return write_atomically(path, buffer.getvalue())


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the cells stand; all lengths in inches, y downwards from the top edge."""

    edges: tuple[float, ...]  # left edge of each column, and the right edge of the last
    cell_height: float
    gap: float
    width: float
    height: float
    characters: tuple[int, ...]  # text columns in the cells of a column; empty: cells without text

    @property
    def left(self) -> float:
        return self.edges[0]

    @property
    def dot(self) -> float:
        """Side of the stationary mark; beside a token's text there is little room for it."""
        return 0.032 if self.characters else 0.32 * min(self.narrowest, self.cell_height)

    @property
    def narrowest(self) -> float:
        return min(right - left for left, right in itertools.pairwise(self.edges))

    def box(self, column: int, row: int) -> _Box:
        x = self.edges[column]
        y = _HEAD + row * self.cell_height
        return x, y, self.edges[column + 1] - x - self.gap, self.cell_height - self.gap


def _layout(grid: Grid, share: float, text: bool = True) -> _Layout:
    """Where the cells of a grid stand that has this share of the picture's width."""
    rows = len(grid.rows)
    characters = _text_columns(grid)
    widths = [(count + 1.2) * _CHARACTER for count in characters]
    cell_height, gap = 0.19, 0.018
    if not text or sum(widths) > share * _WIDEST_WITH_TEXT or rows * cell_height > _TALLEST:
        characters = ()
        cell = min(max(share * _WIDEST / grid.columns, 0.004), 0.16)
        widths = [cell] * grid.columns
        cell_height = min(max(cell, 0.03), _TALLEST / rows)
        gap = 0.12 * min(cell, cell_height)
    left = _MARGIN + 0.32 + 0.07 * len(str(grid.totals.iterations))
    edges = tuple(itertools.accumulate(widths, initial=left))
    return _Layout(
        edges=edges,
        cell_height=cell_height,
        gap=gap,
        width=max(edges[-1] + _MARGIN, _NARROWEST),
        height=_HEAD + rows * cell_height + _FOOT,
        characters=characters,
    )


def _text_columns(grid: Grid) -> tuple[int, ...]:
    """For each column the text columns that its widest token needs, within limits."""
    longest = [_FEWEST_CHARACTERS] * grid.columns
    for cell in grid.cells:
        longest[cell.position] = max(longest[cell.position], cell_len(drawable(cell.piece)))
    return tuple(min(length, _MOST_CHARACTERS) for length in longest)


def _draw(grids: Sequence[Grid], titles: Sequence[str]) -> FigureCanvasAgg:
    layouts = [_layout(grid, 1 / len(grids)) for grid in grids]
    if not all(layout.characters for layout in layouts):
        # cells with text in one grid and without in another would not compare
        layouts = [_layout(grid, 1 / len(grids), text=False) for grid in grids]
    width, height = sum(one.width for one in layouts), max(one.height for one in layouts)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left = 0.0
    for grid, layout, title in zip(grids, layouts, titles, strict=True):
        axes = figure.add_axes((left / width, 0.0, layout.width / width, 1.0))
        left += layout.width
        axes.set_axis_off()
        axes.set_xlim(0, layout.width)
        axes.set_ylim(height, 0)
        _head(axes, grid, layout, title)
        _legend(axes, canvas)
        _rulers(axes, grid, layout)
        _cells(axes, grid, layout)
        if layout.characters:
            _pieces(axes, grid, layout)
    return canvas


def _write(axes: Axes, x: float, y: float, text: str, **keywords: Any) -> Text:
    # A model may emit dollar signs: no math, no TeX, whatever the caller's rcParams say.
    return axes.text(x, y, drawable(text), parse_math=False, usetex=False, **keywords)


def _head(axes: Axes, grid: Grid, layout: _Layout, title: str) -> None:
    totals = grid.totals
    _write(axes, _MARGIN, 0.42, title, color=_TITLE_INK, fontproperties=font(12, bold=True))
    numbers = (
        f"{totals.tokens} tokens in {totals.iterations} iterations "
        f"({totals.tokens_per_forward:.2f} per forward) · {totals.fast_forwarded} fast-forwarded · "
        f"{totals.stationary} stationary · {totals.mode} mode, block size {totals.block_size}"
    )
    _write(axes, _MARGIN, 0.64, numbers, color=_INK, fontproperties=font(8.5))
    if grid.prompt_text:
        room = int((layout.width - 2 * _MARGIN) / 0.074)
        prompt = shorten(f"prompt: {grid.prompt_text}", room)
        _write(axes, _MARGIN, 0.84, prompt, color=_FAINT, fontproperties=font(8))


def _legend(axes: Axes, canvas: FigureCanvasAgg) -> None:
    x, y = _MARGIN, 0.97
    entries = [
        ("fixed", "fixed", False, False),
        ("fixed", "fast-forwarded", True, False),
        ("right", STYLES["right"].meaning, False, False),
        ("right", "stationary", False, True),
        ("wrong", STYLES["wrong"].meaning, False, False),
    ]
    for state, meaning, fast_forwarded, stationary in entries:
        box = (x, y, 0.24, 0.16)
        _fill(axes, [box], STYLES[state].fill)
        if fast_forwarded:
            _fill(axes, [_bar(box)], FAST_FORWARDED)
        if stationary:
            _fill(axes, [_dot(box, 0.045)], STATIONARY)
        text = _write(axes, x + 0.31, y + 0.125, meaning, color=_INK, fontproperties=font(8))
        x += 0.31 + text.get_window_extent(canvas.get_renderer()).width / _DPI + 0.28


def _rulers(axes: Axes, grid: Grid, layout: _Layout) -> None:
    small = font(6.5)
    step = _step(grid.columns, layout.narrowest, 0.1 + 0.06 * len(str(grid.columns)))
    for column in range(0, grid.columns, step):
        x, y, width, _ = layout.box(column, 0)
        _write(
            axes, x + width / 2, y - 0.05, str(column), ha="center", color=_FAINT,
            fontproperties=small,
        )  # fmt: skip
    step = _step(len(grid.rows), layout.cell_height, 0.13)
    for number in range(0, len(grid.rows), step):
        _, y, _, height = layout.box(0, number)
        label = "guess" if number == 0 else str(number)
        _write(
            axes, layout.left - 0.06, y + height / 2, label, ha="right", va="center_baseline",
            color=_FAINT, fontproperties=small,
        )  # fmt: skip
    # a hairline leads the eye from a row's number to where its window stands
    for row in grid.rows[::step]:
        x, y, _, height = layout.box(0, row.iteration)
        end = layout.edges[row.position] if row.position < grid.columns else layout.edges[-1]
        if end > x:
            axes.hlines(y + height / 2, x, end - layout.gap, colors=_RULE, linewidth=0.5, snap=True)


def _step(count: int, pitch: float, room: float) -> int:
    """The smallest round step at which labels of ``room`` inches do not touch."""
    for step in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000):
        if step * pitch >= room:
            return step
    return max(count, 1)


def _bar(box: _Box) -> _Box:
    x, y, width, height = box
    thickness = max(0.16 * height, min(0.35 * height, 1.5 / _DPI))
    return x, y + height - thickness, width, thickness


def _dot(box: _Box, side: float) -> _Box:
    x, y, width, _ = box
    return x + width - 1.3 * side, y + 0.3 * side, side, side


def _cells(axes: Axes, grid: Grid, layout: _Layout) -> None:
    boxes = [
        (cell, layout.box(cell.position, row.iteration)) for row in grid.rows for cell in row.cells
    ]
    for state, style in STYLES.items():
        _fill(axes, [box for cell, box in boxes if cell.state == state], style.fill)
    _fill(axes, [_bar(box) for cell, box in boxes if cell.fast_forwarded], FAST_FORWARDED)
    _fill(axes, [_dot(box, layout.dot) for cell, box in boxes if cell.stationary], STATIONARY)


def _fill(axes: Axes, boxes: Iterable[_Box], colour: str) -> None:
    corners = [
        [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
        for x, y, width, height in boxes
    ]
    if corners:
        axes.add_collection(
            PolyCollection(corners, facecolors=colour, edgecolors="none", linewidths=0),
            autolim=False,
        )


def _pieces(axes: Axes, grid: Grid, layout: _Layout) -> None:
    face = font(_TEXT_POINTS, mono=True)
    for row in grid.rows:
        for cell in row.cells:
            _piece(axes, row, cell, layout, face)


def _piece(axes: Axes, row: Row, cell: Cell, layout: _Layout, face: Any) -> None:
    shown, room = drawable(cell.piece), layout.characters[cell.position]
    if cell_len(shown) > room:
        shown = set_cell_size(shown, room - 1) + "…"
    x, y, width, height = layout.box(cell.position, row.iteration)
    axes.text(
        x + width / 2, y + 0.48 * height, shown, ha="center", va="center_baseline",
        color=STYLES[cell.state].ink, fontproperties=face, parse_math=False, usetex=False,
    )  # fmt: skip
