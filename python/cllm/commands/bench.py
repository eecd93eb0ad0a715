"""``cllm bench``: every way to decode a model against each other, on prompts of one's own."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from .chosen import given_adapter, shipped_for
from .common import CommandError, choose_prompts, diagnostics, load, writable_folder, write_json
from .options import (
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    MaxNewTokensOption,
    ModelOption,
    PromptLimitOption,
    PromptOption,
    PromptsOption,
    ShippedAdapterOption,
    ThreadsOption,
)

_TASK = "prompts"
_WARM_UP = 2


def bench(
    model: ModelOption = None,
    adapter: ShippedAdapterOption = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="PATH_OR_HUB_ID",
            help="A smaller model with the same tokenizer, for assisted generation.",
            show_default=False,
        ),
    ] = None,
    cllm_weights: Annotated[
        str | None,
        typer.Option(
            "--cllm-weights",
            metavar="PATH_OR_HUB_ID",
            help="A consistency LLM of this model; its text is its own.",
            show_default=False,
        ),
    ] = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    limit: PromptLimitOption = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            help="Only this one beside HuggingFace's eager decoding; may be given several times; "
            "'list' shows them.  [default: all]",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            min=1,
            help="Batch size; may be given several times.  [default: 1]",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Times that every prompt is decoded.")
    ] = 2,
    max_new_tokens: MaxNewTokensOption = 64,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            min=1,
            help="n of our contenders that do not choose it.  [default: that of each of them]",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="FOLDER",
            help="Keeps what is finished, for a run that is interrupted.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
    debug: DebugOption = False,
) -> int:
    """Race every way to decode a model: HuggingFace's own, prompt lookup, a draft model, ours.

    Each in a process with a model of its own: all of them have to fit into memory.
    """
    from ..bench.contenders import CONTENDERS, EAGER

    if contender == ["list"]:
        sys.stdout.write("\n".join(CONTENDERS) + "\n")
        return 0
    for name in contender or ():
        if name not in CONTENDERS:
            raise CommandError(f"there is no contender {name!r}; --contender list shows them")
    chosen = choose_prompts(prompt, prompts, limit)
    sizes = tuple(batch or (1,))
    if len(chosen) < max(sizes):
        raise CommandError(
            f"--batch {max(sizes)} needs as many prompts, but there are {len(chosen)}"
            + ("" if prompt or prompts else "; raise --limit")
        )
    if work is not None:
        writable_folder(work)
    errors = diagnostics()
    loaded = load(model, Dtype.float32, device, threads, errors)
    with errors.status("looking for an adapter"):
        guesser = shipped_for(loaded) if adapter is None else given_adapter(adapter, loaded, errors)

    from ..bench.comparison import Comparison, Plan
    from ..bench.contenders import Setup
    from ..bench.tasks import Kept, Task
    from ..evaluation import encode_prompts
    from ..prompts import shipped_prompts

    encoded = encode_prompts(loaded.model, loaded.tokenizer, chosen)
    # contenders compile and tune themselves before anything counts, on prompts that do not
    warm_up = encode_prompts(loaded.model, loaded.tokenizer, shipped_prompts()[-_WARM_UP:])
    task = Task(_TASK, encoded + warm_up, None, max_new_tokens)
    setup = Setup(
        loaded.model.config.name_or_path,
        dtype.value,
        str(loaded.model.device),
        None if guesser is None else guesser.source,
        draft,
        cllm_weights,
        block_size,
        max(map(len, task.prompts)) + max_new_tokens + 16,
    )
    names = tuple(CONTENDERS) if not contender else tuple(dict.fromkeys((EAGER, *contender)))
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        status = stack.enter_context(errors.status("starting"))
        comparison = Comparison(
            loaded.model,
            [task],
            setup,
            Plan(names, sizes, rounds=rounds, warm_up=_WARM_UP),
            Kept(folder),
            limit=len(encoded),
            tell=lambda line: status.update(line.replace("[", r"\[")),
        )
        floor = comparison.floor()
        found = comparison.run()
    result = {
        "model": loaded.name,
        "adapter": None if guesser is None else guesser.to_json(),
        "dtype": dtype.value,
        "device": setup.device,
        "block_size": block_size,
        "rounds": rounds,
        "floor": floor,
        "absent": comparison.failures,
        "batches": {size: tasks[_TASK] for size, tasks in found.items()},
    }
    if as_json:
        write_json(result)
    else:
        _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    screen = Console(file=sys.stdout, highlight=False)
    if not screen.is_terminal:
        screen = Console(file=sys.stdout, highlight=False, width=130)
    floor = result["floor"]
    for size, figures in result["batches"].items():
        screen.print(
            f"{result['model']}, {result['dtype']}, {result['device']}, batch {size}: "
            f"{figures['prompts']} prompts, up to {figures['max_new_tokens']} new tokens each, "
            f"decoded {_times(result['rounds'])}",
            markup=False,
            soft_wrap=True,
        )
        screen.print(_table(figures, floor["seconds_per_forward"]))
    if result["adapter"] is not None:
        screen.print(f"adapter: {result['adapter']['name']}", markup=False, soft_wrap=True)
    screen.print(
        f"floor: {floor['weight_bytes'] / 2**20:.0f} MiB of weights at "
        f"{floor['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{1e3 * floor['seconds_per_forward']:.1f} ms a forward",
        soft_wrap=True,
    )
    for name, reason in result["absent"].items():
        screen.print(f"not there: {name}: {reason}", markup=False, soft_wrap=True)


def _times(count: int) -> str:
    return f"{count} time" + ("" if count == 1 else "s")


def _table(figures: dict[str, Any], floor: float) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(header_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("", no_wrap=True)
    for header in (
        "of HuggingFace\n(quartiles)",
        "tokens/s",
        "tokens/\nforward",
        "ms/\nforward",
        "floor's\nshare",
        "first\ntoken, ms",
        "peak\nMiB",
        "text of fp32\ngreedy search",
    ):
        table.add_column(header, justify="right")
    contenders = {name: one for name, one in figures.items() if isinstance(one, dict)}
    best = max(contenders, key=lambda name: contenders[name]["ratio"]["median"])
    for name, one in contenders.items():
        ratio, first = one["ratio"], one["first_token"]
        ties = f" +{one['near_ties']} near-ties" if one["near_ties"] else ""
        table.add_row(
            name,
            f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})",
            f"{one['tokens_per_second']['median']:.1f}",
            f"{one['tokens_per_forward']:.2f}",
            f"{1e3 * one['seconds_per_forward']:.1f}",
            f"{100 * floor / one['seconds_per_forward']:.0f} %",
            "" if first is None else f"{1e3 * first['median']:.0f}",
            f"{one['peak_bytes'] / 2**20:.0f}",
            f"{one['same']}/{one['texts']}{ties}",
            style="bold green" if name == best else None,
        )
    return table
