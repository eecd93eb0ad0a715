"""``cllm demo``: one-token decoding and Jacobi decoding side by side, on a real model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .chosen import DEFAULT_BLOCK_SIZE, ChosenAdapter, given_adapter, shipped_for, sizes
from .common import (
    CommandError,
    choose_prompts,
    decoding_config,
    diagnostics,
    load,
    writable_folder,
    write_json,
)
from .options import (
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    Fill,
    FillOption,
    LookupOption,
    MaxNewTokensOption,
    Mode,
    ModelOption,
    ModeOption,
    PromptLimitOption,
    PromptOption,
    PromptsOption,
    SeedOption,
    ShippedAdapterOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..decoding import JacobiConfig
    from ..models import LoadedModel
    from ..prompts import Prompt
    from .measure import Measurement, PromptResult
    from .view import LiveView, PlainView

DEFAULT_REPORT = Path("cllm-demo-report")


def demo(
    model: ModelOption = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    limit: PromptLimitOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            min=1,
            help="n: tokens guessed and checked in one forward.  [default: what the adapter was "
            f"made for, {DEFAULT_BLOCK_SIZE} without one]",
            show_default=False,
        ),
    ] = None,
    adapter: ShippedAdapterOption = None,
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="Let the plain model guess.")
    ] = False,
    verify_size: Annotated[
        int | None,
        typer.Option(
            "--verify-size",
            min=1,
            help="With an adapter: tokens of the window that the model checks.  [default: what "
            "the adapter was made for, else all]",
            show_default=False,
        ),
    ] = None,
    lookup: LookupOption = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "auto",
    mode: ModeOption = Mode.sliding,
    fill: FillOption = Fill.prompt,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="DIR",
            help=f"Folder of the trajectory report.  [default: {DEFAULT_REPORT}; none with --json]",
            show_default=False,
        ),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the view and table.")
    ] = False,
    debug: DebugOption = False,
) -> int:
    """Decode prompts one token at a time and by Jacobi iteration, and compare."""
    if report is not None and no_report:
        raise CommandError("give --report or --no-report, not both")
    _check_adapter_options(adapter, no_adapter, block_size, verify_size)
    chosen = choose_prompts(prompt, prompts, limit)
    folder = None
    if not no_report and (report is not None or not as_json):
        folder = writable_folder(report or DEFAULT_REPORT)

    errors = diagnostics()
    loaded = load(model, dtype, device, threads, errors)
    encoded = _encode(loaded, chosen)
    with errors.status("looking for an adapter"):
        guesser = None
        if adapter is not None:
            guesser = given_adapter(adapter, loaded, errors)
        elif not no_adapter:
            guesser = shipped_for(loaded)
    n, v = sizes(block_size, verify_size, mode.value, guesser)
    config = decoding_config(n, mode, fill, seed, verify_size=v, lookup=lookup)
    facts = _facts(loaded, dtype, config, max_new_tokens, guesser)
    measurement, view = _measurement(
        loaded, config, max_new_tokens, facts, errors, guesser, as_json
    )
    with errors.status("warming up both sides"):
        measurement.warm_up(encoded[0][1])
    with view:
        results = measurement.run(encoded)
    files: list[Path] = []
    if folder is not None:
        if guesser is not None:
            with errors.status("decoding without the adapter, for the report"):
                results = list(measurement.without_adapter(encoded, results))
        with errors.status("writing the report"):
            files = _write_report(results, folder, loaded.name, guesser)
    if as_json:
        write_json(_as_json(results, facts, files))
    else:
        _print_results(results, dtype, files, guesser)
    return 1 if dtype is Dtype.float32 and any(not result.identical for result in results) else 0


def _check_adapter_options(
    adapter: str | None, no_adapter: bool, block_size: int | None, verify_size: int | None
) -> None:
    if adapter is not None and no_adapter:
        raise CommandError("give --adapter or --no-adapter, not both")
    if no_adapter and verify_size is not None:
        raise CommandError("--verify-size needs an adapter; leave --no-adapter out")
    if block_size is not None and verify_size is not None and verify_size > block_size:
        raise CommandError(f"--verify-size {verify_size} is above --block-size {block_size}")


def _write_report(
    results: list[PromptResult], folder: Path, name: str, guesser: ChosenAdapter | None
) -> list[Path]:
    from dataclasses import replace

    from ..report import write_report

    title = f"Jacobi decoding, {name}"
    trajectories = []
    for result in results:
        if result.plain is None or guesser is None:
            trajectories.append(result.trajectory)
        else:
            # beside each other, under these titles
            trajectories.append(replace(result.plain, title="base model alone"))
            trajectories.append(replace(result.trajectory, title=f"with adapter {guesser.name}"))
    return write_report(trajectories, folder, title=title)


def _encode(loaded: LoadedModel, prompts: list[Prompt]) -> list[tuple[Prompt, torch.Tensor]]:
    from ..prompts import check_length, encode

    encoded = []
    for prompt in prompts:
        ids = encode(loaded.tokenizer, prompt)
        check_length(loaded.model, prompt, ids)
        encoded.append((prompt, ids))
    return encoded


def _measurement(
    loaded: LoadedModel,
    config: JacobiConfig,
    max_new_tokens: int,
    facts: dict[str, Any],
    errors: Console,
    guesser: ChosenAdapter | None,
    as_json: bool,
) -> tuple[Measurement, LiveView | PlainView]:
    """What measures, and the view that fits where standard output goes."""
    from rich.console import Console

    from .measure import Measurement
    from .view import LiveView, PlainView

    screen = Console(file=sys.stdout, highlight=False)
    line = guesser.line if guesser is not None else None
    view: LiveView | PlainView
    if screen.is_terminal and not screen.is_dumb_terminal and not as_json:

        def decode(ids: list[int]) -> str:
            return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))

        place = facts["device"]
        if place == "cpu":
            threads = facts["threads"]
            place += f" with {threads} thread{'' if threads == 1 else 's'}"
        heading = f"{loaded.name}, {facts['dtype']}, {place}, greedy"
        view = LiveView(screen, decode, heading, config.width, line)
    else:
        view = PlainView(errors)
        if line is not None:
            errors.print(line, markup=False, soft_wrap=True)
    adapter = guesser.adapter if guesser is not None else None
    return Measurement(loaded, config, max_new_tokens, view, adapter), view


def _facts(
    loaded: LoadedModel,
    dtype: Dtype,
    config: JacobiConfig,
    max_new_tokens: int,
    guesser: ChosenAdapter | None,
) -> dict[str, Any]:
    import torch

    from .info import versions

    return {
        "model": loaded.name,
        "dtype": dtype.value,
        "device": str(loaded.model.device),
        "threads": torch.get_num_threads(),
        "adapter": guesser.to_json() if guesser is not None else None,
        "block_size": config.block_size,
        "verify_size": config.verify_size,
        "lookup": config.longest_lookup,
        "mode": config.mode,
        "fill": config.fill,
        "seed": config.seed,
        "max_new_tokens": max_new_tokens,
        "versions": versions(),
    }


def _as_json(
    results: list[PromptResult], facts: dict[str, Any], files: list[Path]
) -> dict[str, Any]:
    from .view import Totals

    totals = Totals(results)
    sides = {
        side: {
            "tokens": totals.tokens(side),
            "seconds": totals.seconds(side),
            "tokens_per_second": totals.tokens_per_second(side),
        }
        for side in ("autoregressive", "jacobi")
    }
    return {
        **facts,
        "tokens": totals.tokens("jacobi"),
        "iterations": totals.forwards,
        "iterations_without_adapter": totals.plain_forwards,
        "tokens_per_forward": totals.tokens_per_forward,
        "identical": totals.identical,
        **sides,
        "speedup": totals.speedup,
        "prompts": [_prompt_json(result) for result in results],
        "report": [str(file) for file in files],
    }


def _prompt_json(result: PromptResult) -> dict[str, Any]:
    from dataclasses import asdict

    sides = {
        side: {
            "tokens": len(done.ids),
            "seconds": done.seconds,
            "tokens_per_second": done.tokens_per_second,
        }
        for side, done in (
            ("autoregressive", result.autoregressive),
            ("jacobi", result.jacobi),
        )
    }
    return {
        "id": result.prompt.id,
        "prompt": result.prompt.text,
        "prompt_tokens": result.prompt_tokens,
        "text": result.text,
        "tokens": len(result.jacobi.ids),
        "iterations": result.jacobi.forwards,
        "iterations_without_adapter": len(result.plain.iterations) if result.plain else None,
        "tokens_per_forward": result.tokens_per_forward,
        "identical": result.identical,
        **sides,
        "speedup": result.speedup,
        "difference": asdict(result.difference) if result.difference else None,
        "near_ties": [{"index": index, "gap": gap} for index, gap in result.near_ties],
    }


def _print_results(
    results: list[PromptResult], dtype: Dtype, files: list[Path], guesser: ChosenAdapter | None
) -> None:
    from rich.console import Console

    from .view import results_table

    screen = Console(file=sys.stdout, highlight=False)
    if not screen.is_terminal:
        # a pipe has no width: a table cut to 80 columns would lose figures
        screen = Console(file=sys.stdout, highlight=False, width=120)
    screen.print(results_table(results, adapter=guesser is not None))
    if guesser is not None:
        screen.print(guesser.line, markup=False, soft_wrap=True)
    for result in results:
        for line in _remarks(result, dtype):
            screen.print(line, markup=False, soft_wrap=True)
    if files:
        screen.print(f"report: {files[0]}", markup=False, soft_wrap=True)


def _remarks(result: PromptResult, dtype: Dtype) -> list[str]:
    """What there is to say of a prompt whose sides differ, or that was run in low precision."""
    lines = []
    name = result.prompt.id
    if result.difference is not None:
        apart = result.difference
        line = (
            f"{name}: differs from token {apart.index} on: one-token {apart.autoregressive!r}"
            f"{_gap(apart.autoregressive_gap)}, Jacobi {apart.jacobi!r}{_gap(apart.jacobi_gap)}"
        )
        if dtype is not Dtype.float32:
            line += f"; {dtype.value} forwards of other width round differently, near-ties flip"
        lines.append(line)
    if result.verification is not None:
        line = f"{name}: against one full forward: {result.verification}"
        if result.near_ties:
            ties = ", ".join(f"{index} (gap {gap:.3g})" for index, gap in result.near_ties)
            line += f"; near-ties at tokens {ties}"
        lines.append(line)
    return lines


def _gap(gap: float | None) -> str:
    return "" if gap is None else f" (logit gap {gap:.3g})"
