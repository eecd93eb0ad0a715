"""The report of Jacobi decoding: figure 7 of CLLM (arXiv 2403.00835) from recorded trajectories.

One row an iteration, one cell a token: fixed tokens blue, guesses that are not right yet red,
fast-forwarded and stationary tokens marked and counted. In a terminal, as PNG, and as one HTML
file that opens from disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .. import trajectory as trajectory_files
from ..trajectory import Trajectory
from .cells import Cell, Grid, ReportError, Row, Totals, build_grid
from .groups import grouped
from .html import build_grids, render_html, write_html
from .terminal import TerminalGrid, render_terminal

__all__ = [
    "Cell",
    "Grid",
    "ReportError",
    "Row",
    "TerminalGrid",
    "Totals",
    "build_grid",
    "grouped",
    "render_html",
    "render_terminal",
    "write_html",
    "write_png",
    "write_report",
]


def write_png(
    trajectory: Trajectory | Sequence[Trajectory],
    path: str | os.PathLike[str],
    *,
    titles: Sequence[str] | None = None,
) -> Path:
    """Draw one trajectory, or several side by side, into a PNG; see `cllm.report.png.write_png`.

    Returns:
        The path written.

    Raises:
        ReportError: if a trajectory has no iterations or tokens, or there is none, or not one title
            for each.
        OSError: if the file cannot be written.
    """
    # matplotlib is slow to import, and neither the terminal nor the page needs it
    from . import png

    return png.write_png(trajectory, path, titles=titles)


def write_report(
    trajectories: Sequence[Trajectory],
    folder: str | os.PathLike[str],
    *,
    title: str = "Jacobi decoding",
) -> list[Path]:
    """Write every form of the report into a folder, which is made where it is missing.

    ``index.html`` shows all trajectories, ``trajectory-001.png`` and so on one prompt each, and
    ``trajectories.jsonl`` holds the record that `cllm.trajectory.load` reads back. Titled
    trajectories of one prompt stand beside each other (`grouped`).

    Returns:
        The paths written: the page, the record, then the pictures in order.

    Raises:
        ReportError: if there are no trajectories, or one has no iterations or tokens; nothing is
            written then.
        OSError: if the folder or a file cannot be written.
    """
    folder = Path(folder)
    build_grids(trajectories)
    groups = grouped(trajectories)
    digits = max(3, len(str(len(groups))))
    return [
        write_html(trajectories, folder / "index.html", title=title),
        trajectory_files.save(folder / "trajectories.jsonl", trajectories),
        *(
            write_png(group, folder / f"trajectory-{number:0{digits}}.png")
            for number, group in enumerate(groups, start=1)
        ),
    ]
