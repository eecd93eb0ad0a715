"""``cllm report``: draw recorded trajectories."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import CommandError, diagnostics
from .options import DebugOption


def report(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.jsonl",
            help="Trajectories that `cllm demo` or `cllm generate --trajectories` recorded.",
        ),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="PATH", help="Write one self-contained page.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="PATH", help="Draw one trajectory as a picture.")
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Draw one trajectory in the terminal.")
    ] = False,
    number: Annotated[
        int,
        typer.Option("--number", min=1, help="Which prompt the terminal and picture show."),
    ] = 1,
    debug: DebugOption = False,
) -> int:
    """Draw recorded trajectories in the terminal, as a page, as a picture.

    Without --html, --png or --terminal: the terminal, and a page beside FILE.jsonl.
    """
    if html is None and png is None and not terminal:
        html, terminal = file.with_suffix(".html"), True
    with diagnostics().status("reading the record"):
        from .. import report as drawing
        from ..trajectory import load

        trajectories = load(file)
    if not trajectories:
        raise CommandError(f"{file}: no trajectories in it")
    groups = drawing.grouped(trajectories)
    if number > len(groups):
        holds = f"{len(groups)} trajectories"
        if len(groups) < len(trajectories):
            holds = f"trajectories of {len(groups)} prompts"
        raise CommandError(f"--number {number}: {file} holds {holds}")
    chosen = groups[number - 1]

    from rich.console import Console

    screen = Console(file=sys.stdout, highlight=False)
    if terminal:
        for one in chosen:
            if one.title is not None:
                screen.print(one.title, markup=False, style="bold")
            screen.print(drawing.render_terminal(one))
    if png is not None:
        written = drawing.write_png(chosen, png)
        screen.print(f"picture: {written}", markup=False, soft_wrap=True)
    if html is not None:
        written = drawing.write_html(trajectories, html, title=f"Jacobi decoding, {file.name}")
        screen.print(f"page: {written}", markup=False, soft_wrap=True)
    return 0
