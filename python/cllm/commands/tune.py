"""``cllm tune``: which window decodes this model fastest on this machine."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import choose_prompts, diagnostics, load, load_adapter, write_json
from .options import (
    AdapterOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    MaxNewTokensOption,
    ModelOption,
    PromptLimitOption,
    PromptOption,
    PromptsOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from ..spread import Spread
    from ..tuning import Measured, Progress, Tuning, Window


def tune(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    limit: PromptLimitOption = None,
    max_new_tokens: MaxNewTokensOption = 64,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
    debug: DebugOption = False,
) -> int:
    """Find the block size (with --adapter: and the verify size) that decodes fastest here."""
    chosen = choose_prompts(prompt, prompts, limit)
    errors = diagnostics()
    loaded = load(model, dtype, device, threads, errors)
    gated = None if adapter is None else load_adapter(adapter, loaded, errors)
    from ..tuning import tune as find

    with _bar(errors) as progress:
        found = find(
            loaded.model,
            chosen,
            gated,
            tokenizer=loaded.tokenizer,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    line = found.line(json.dumps(adapter))
    if as_json:
        import torch

        facts = {
            "model": loaded.name,
            "adapter": adapter,
            "dtype": dtype.value,
            "device": str(loaded.model.device),
            "threads": torch.get_num_threads(),
        }
        write_json(facts | found.to_json() | {"line": line})
    else:
        _print(found, line)
    return 0


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stdout=False) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def _print(found: Tuning, line: str | None) -> None:
    from rich.console import Console

    screen = Console(file=sys.stdout, highlight=False)
    if not screen.is_terminal:
        # a pipe has no width: a table cut to 80 columns would lose figures
        screen = Console(file=sys.stdout, highlight=False, width=120)
    screen.print(_table(found))
    for text in _words(found, line):
        screen.print(text, markup=False, soft_wrap=True)


def _table(found: Tuning) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(header_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("")
    table.add_column("window")
    for header in (
        "rows",
        "ms/\nforward",
        "tokens/\nforward",
        "tokens/s\npromised",
        "tokens/s\nmeasured",
        "of HuggingFace\n(quartiles)",
    ):
        table.add_column(header, justify="right")
    whole = {one.window: one for one in found.measured}
    table.add_row("", "HuggingFace greedy", "", "", "1.00", "", *_measured(whole[None]))
    for one in found.candidates:
        window, best = one.window, one.window == found.best
        table.add_row(
            "*" if best else "",
            str(window),
            str(window.rows),
            f"{1e3 * one.seconds_per_forward.median:.1f}",
            f"{one.tokens_per_forward:.2f}",
            f"{one.tokens_per_second:.1f}",
            *(_measured(whole[window]) if window in whole else ("", "")),
            style="bold green" if best else None,
        )
    return table


def _measured(one: Measured) -> tuple[str, str]:
    return f"{one.tokens_per_second.median:.1f}", _ratio(one.ratio)


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"


def _words(found: Tuning, line: str | None) -> list[str]:
    whole: dict[Window | None, Measured] = {one.window: one for one in found.measured}
    best = found.best
    if best is None or line is None:
        return [
            "nothing beats one token per forward (n = 1, or HuggingFace's own) with this model and "
            "these prompts on this machine; leave the model as it is"
        ]
    return [f"fastest: {best}, {_ratio(whole[best].ratio)} HuggingFace greedy", line]
