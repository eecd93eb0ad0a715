"""Trajectories as one self-contained HTML page that opens from disk and asks no network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import string
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..files import write_atomically
from ..trajectory import Trajectory
from . import palette
from .cells import Cell, Grid, ReportError, build_grid
from .groups import group_numbers
from .text import encodable, shorten

_LABEL_LENGTH = 110
_LONG_PREFIX = 24
_WORD = string.ascii_letters + string.digits


def write_html(
    trajectories: Sequence[Trajectory],
    path: str | os.PathLike[str],
    *,
    title: str = "Jacobi decoding",
) -> Path:
    """Write one HTML file that shows the trajectories, with a slider over iterations.

    Trajectories of one prompt that follow each other and have titles stand beside each other and
    are moved by the same slider (`cllm.report.groups`).

    Style, script and data are inside the file; a content security policy forbids everything else.
    The fragment ``#trajectory=0&iteration=5`` opens it at one iteration (both counted as in
    `cllm.report.cells`: the first prompt is 0, iteration 0 is the initial guess);
    ``&theme=dark`` or ``light`` overrides the reader's preference. The file appears whole or not
    at all.

    Returns:
        The path written.

    Raises:
        ReportError: if there are no trajectories, or one has no iterations or tokens; the message
            names it.
        OSError: if the file cannot be written.
    """
    grids = build_grids(trajectories)
    titles = [one.title for one in trajectories]
    page = render_html(grids, title, titles=titles, groups=group_numbers(trajectories))
    return write_atomically(path, page.encode("utf-8"))


def build_grids(trajectories: Sequence[Trajectory]) -> list[Grid]:
    """`build_grid` over several trajectories; an error says which one (counted from 1)."""
    if not trajectories:
        raise ReportError("there are no trajectories to report")
    grids = []
    for number, trajectory in enumerate(trajectories, start=1):
        try:
            grids.append(build_grid(trajectory))
        except ReportError as error:
            raise ReportError(f"trajectory {number} of {len(trajectories)}: {error}") from error
    return grids


def render_html(
    grids: Sequence[Grid],
    title: str,
    *,
    titles: Sequence[str | None] | None = None,
    groups: Sequence[int] | None = None,
) -> str:
    """The page as a string; it encodes as UTF-8 whatever the model wrote.

    Args:
        titles: what stands above each grid; by default nothing does.
        groups: of each grid the number of its prompt, 0, 1, ... ascending; grids of one prompt
            stand beside each other. By default every grid has its own.
    """
    titles = [None] * len(grids) if titles is None else list(titles)
    groups = list(range(len(grids))) if groups is None else list(groups)
    environment = _environment()
    style = environment.get_template("style.css.j2").render(palette=palette)
    script = environment.get_template("script.js.j2").render()
    firsts = [grids[groups.index(number)] for number in range(groups[-1] + 1)]
    headings = dict.fromkeys(titles)  # in order of their first appearance
    page = environment.get_template("page.html.j2").render(
        title=title,
        labels=_labels(firsts),
        titled=any(titles),
        rows=[
            (group, heading, grid.totals)
            for group, heading, grid in zip(groups, titles, grids, strict=True)
        ],
        sums=[
            (heading, _sum([g for g, own in zip(grids, titles, strict=True) if own == heading]))
            for heading in headings
        ],
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        palette=palette,
        data=Markup(
            _embeddable(
                [
                    _record(grid) | {"title": heading and encodable(heading), "group": group}
                    for grid, heading, group in zip(grids, titles, groups, strict=True)
                ]
            )
        ),
    )
    return encodable(page)


def _sum(grids: Sequence[Grid]) -> dict[str, int]:
    names = ("tokens", "iterations", "fast_forwarded", "stationary")
    sums = {name: sum(getattr(grid.totals, name) for grid in grids) for name in names}
    return {"prompts": len(grids), **sums}


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _labels(grids: Sequence[Grid]) -> list[str]:
    """One line a prompt to choose it by; a chat template that all begin with is left out."""
    prompts = [grid.prompt_text or "" for grid in grids]
    common = _common_prefix(prompts) if len(set(prompts)) > 1 else ""
    # not in the middle of a word
    start = len(common.rstrip(_WORD)) if len(common) >= _LONG_PREFIX else 0
    labels = []
    for number, prompt in enumerate(prompts, start=1):
        text = f"{'… ' if start else ''}{prompt[start:].strip()}" if prompt else "no prompt text"
        labels.append(shorten(f"{number}. {text}", _LABEL_LENGTH))
    return labels


def _common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # in sorted order the outermost two differ first
    for index, letter in enumerate(first):
        if letter != last[index]:
            return first[:index]
    return first


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _embeddable(value: Any) -> str:
    """JSON that may stand inside a ``<script>`` element.

    ASCII only, so no U+2028 reaches the parser; without ``<``, ``>`` and
    ``&``, so no token can close the element, open a comment or be read as an entity.
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_CODES = {"fixed": "f", "right": "r", "wrong": "w"}


def _code(cell: Cell) -> str:
    """One letter a cell; a capital one carries the mark that its state can have."""
    code = _CODES[cell.state]
    return code.upper() if cell.fast_forwarded or cell.stationary else code


def _record(grid: Grid) -> dict[str, Any]:
    shown = {cell.token: cell.piece for cell in grid.cells}
    totals = grid.totals
    return {
        "prompt": encodable(grid.prompt_text or ""),
        "totals": {
            "tokens": totals.tokens,
            "iterations": totals.iterations,
            "tokensPerForward": round(totals.tokens_per_forward, 4),
            "fastForwarded": totals.fast_forwarded,
            "stationary": totals.stationary,
            "blockSize": totals.block_size,
            "mode": totals.mode,
        },
        "tokens": grid.tokens,
        "fixedAt": grid.fixed_at,
        "shown": {str(token): piece for token, piece in shown.items()},
        "text": {
            str(token): encodable(grid.pieces.get(token, piece)) for token, piece in shown.items()
        },
        "rows": [
            {
                "position": row.position,
                "committed": row.committed,
                "accepted": row.accepted,
                "tokens": [cell.token for cell in row.cells],
                "states": "".join(_code(cell) for cell in row.cells),
            }
            for row in grid.rows
        ],
    }
