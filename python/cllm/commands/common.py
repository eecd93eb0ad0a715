"""What the subcommands share: options, the terminal, errors for people, loading with a spinner."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..adapter import GatedAdapter
    from ..decoding import JacobiConfig
    from ..models import LoadedModel
    from ..prompts import Prompt


class CommandError(Exception):
    """Wrong usage or input: one line for the user, exit code 2."""


class CommandInterrupted(Exception):
    """Interrupted by the user, with a line on what was kept; exit code 130."""


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Mode(StrEnum):
    sliding = "sliding"
    block = "block"


class Fill(StrEnum):
    prompt = "prompt"
    last = "last"
    random = "random"
    pad = "pad"


def _set_debug(value: bool) -> bool:
    if value:
        os.environ["CLLM_DEBUG"] = "1"
    return value


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="Model folder or hub id.  [default: SmolLM2-135M-Instruct]",
        show_default=False,
    ),
]
# of the prompts that ship with the package, where none are given
_SHIPPED_PROMPTS = 4
PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A prompt of your own; may be given several times."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE.jsonl", help='One {"prompt": "..."} a line.'),
]
PromptLimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        help=f"Use the first N prompts.  [default: {_SHIPPED_PROMPTS} of the 40 that ship with "
        "the package, all of your own]",
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate for a prompt.")
]
BlockSizeOption = Annotated[
    int, typer.Option("--block-size", min=1, help="n: tokens guessed and checked in one forward.")
]


def _block_size(given: str | int) -> int | str:
    text = str(given)  # the default comes as it is
    if text == "auto" or (text.isdecimal() and int(text) >= 1):
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f"{text!r} is neither an integer >= 1 nor auto")


AutoBlockSizeOption = Annotated[
    Any,
    typer.Option(
        "--block-size",
        parser=_block_size,
        metavar="N|auto",
        help="n: tokens guessed and checked in one forward; auto: what should be fastest here.  "
        "[default: 4 on a CPU, fewer in batches; else 16]",
    ),
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Precision of the weights and activations.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto (CUDA where there is one), cpu, cuda, cuda:N.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="PATH_OR_HUB_ID",
        help="Gated adapter: makes the guesses, and the text stays the model's own.",
        show_default=False,
    ),
]
ShippedAdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="PATH_OR_HUB_ID",
        help="Gated adapter: makes the guesses, and the text stays the model's own.  [default: "
        "the one that ships with the package for this model, if there is one]",
        show_default=False,
    ),
]
VerifySizeOption = Annotated[
    int | None,
    typer.Option(
        "--verify-size",
        min=1,
        help="With --adapter: tokens of the window that the model checks.  [default: all]",
        show_default=False,
    ),
]
LookupOption = Annotated[
    int | None,
    typer.Option(
        "--lookup",
        min=0,
        help="Most tokens of the text's end that are looked up in it for guesses; 0: none.  "
        "[default: 3; 0 with --mode block]",
        show_default=False,
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random guesses.")]
_SAMPLING = "Sampling (any of these instead of the most likely token)"
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", help="Above 0.  [default: 1]", rich_help_panel=_SAMPLING),
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", min=1, help="Of the K most likely.", rich_help_panel=_SAMPLING),
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", help="Of the most likely, P in all.", rich_help_panel=_SAMPLING),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p", help="Of those with P times the best one's.", rich_help_panel=_SAMPLING
    ),
]
ModeOption = Annotated[
    Mode, typer.Option("--mode", help="sliding window, or the paper's block by block.")
]
FillOption = Annotated[
    Fill, typer.Option("--fill", help="Where a guess comes from when nothing better is known.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads for torch.  [default: torch's choice]"),
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", callback=_set_debug, help="Show tracebacks of errors."),
]


def diagnostics() -> Console:
    """A rich console on standard error, bound to the stream as it is now."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def write_json(value: Any) -> None:
    """One JSON object on standard output."""
    import json

    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def decoding_config(
    block_size: int | Literal["auto"] | None,
    mode: Mode,
    fill: Fill,
    seed: int,
    record: bool = False,
    verify_size: int | None = None,
    lookup: int | None = None,
) -> JacobiConfig:
    """The options as a validated `JacobiConfig`."""
    from ..decoding import JacobiConfig

    if lookup and mode is Mode.block:
        raise CommandError(f"--lookup {lookup} needs --mode sliding: a block keeps its own guesses")
    if block_size == "auto" and mode is Mode.block:
        raise CommandError("--block-size auto needs --mode sliding")
    if block_size == "auto" and verify_size is not None:
        raise CommandError("--block-size auto chooses the verify size, too; leave --verify-size")
    return JacobiConfig(
        block_size=block_size,
        mode=mode.value,
        fill=fill.value,
        seed=seed,
        record_trajectories=record,
        verify_size=verify_size,
        lookup=lookup,
    )


def sampling_settings(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None
) -> dict[str, float]:
    """Arguments of ``generate`` for the sampling options that were given; none: greedy search.

    Raises:
        CommandError: a number out of its range.
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, value in given.items():
        most = float("inf") if name in ("temperature", "top_k") else 1
        if value is not None and not 0 < value <= most:
            flag = "--" + name.replace("_", "-")
            bound = "" if most > 1 else " and at most 1"
            raise CommandError(f"{flag} {value:g} must be above 0{bound}; leave it out for greedy")
    return {name: value for name, value in given.items() if value is not None}


def load(
    name: str | None, dtype: Dtype, device: str, threads: int | None, console: Console
) -> LoadedModel:
    """Load a model with a spinner on `console`; the default model's conversion draws a bar."""
    with console.status("starting torch and transformers"):
        import torch

        from .. import default_model
        from ..models import DTYPES, load_model, pick_device

        if threads is not None:
            torch.set_num_threads(threads)
        where = pick_device(device)
        _quieten()
        if name is None:
            missing = default_model.damage(default_model.model_folder(), hashes=False)
    if name is None and missing is not None:
        # a changed file of the right size is found, and converted again, by load_model
        with conversion_bar(console, default_model.STAGES) as progress:
            default_model.ensure_converted(progress)
    with console.status(f"loading {name or default_model.NAME}"):
        return load_model(name, dtype=DTYPES[dtype.value], device=where)


def load_adapter(source: str, loaded: LoadedModel, errors: Console) -> GatedAdapter:
    """The gated adapter at `source`, checked against the model; a line on `errors` where it does
    not say that it was trained with the gate.

    Raises:
        AdapterError: it cannot be read, or belongs to another model.
    """
    from ..adapter import GatedAdapter

    adapter = GatedAdapter.load(source)
    adapter.check(loaded.model)
    if adapter.metadata.get("gated") is not True:  # Python's warnings are off here
        errors.print(
            f"{source} does not say that it was trained with the gate: same text, fewer right "
            "guesses",
            markup=False,
            soft_wrap=True,
        )
    return adapter


def choose_prompts(given: list[str] | None, file: Path | None, limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of --prompt or --prompts, else of those in the package.

    Raises:
        CommandError: if both are given.
    """
    from ..prompts import Prompt, read_prompts, shipped_prompts

    if given and file:
        raise CommandError("give --prompt or --prompts, not both")
    if given:
        chosen = [Prompt(f"prompt {number}", text) for number, text in enumerate(given, 1)]
    elif file:
        chosen = read_prompts(file)
    else:
        chosen, limit = shipped_prompts(), limit or _SHIPPED_PROMPTS
    return chosen[:limit]


def _quieten() -> None:
    """Keep transformers' advice and bars off the screen for the rest of this process."""
    import warnings

    from transformers.utils import logging

    if os.environ.get("CLLM_DEBUG") != "1":
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")


@contextmanager
def conversion_bar(console: Console, stages: tuple[str, ...]) -> Iterator[Any]:
    """Draw the default model's one-time conversion; yields its progress callback."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console.print("Converting the default model, once (about half a minute).")
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("step {task.fields[step]} of {task.total}"),
        TimeElapsedColumn(),
        console=console,
        redirect_stderr=False,
        redirect_stdout=False,
    ) as bar:
        width = max(len(stage) for stage in stages)
        task = bar.add_task(stages[0].ljust(width), total=len(stages), step=1)

        def report(stage: int) -> None:
            done = stage == len(stages)
            text = "converted" if done else stages[stage]
            bar.update(
                task,
                completed=stage,
                description=text.ljust(width),
                step=min(stage + 1, len(stages)),
            )

        yield report


def writable_folder(folder: Path) -> Path:
    """`folder`, made if it is missing.

    Raises:
        CommandError: if it is a file or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CommandError(f"{folder} is a file; name a folder") from error
    except OSError as error:
        raise CommandError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"the folder {folder} is not writable")
    return folder


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, or its type where it has none."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
