"""What the subcommands share: the terminal, errors for people, loading with a spinner."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .options import SHIPPED_PROMPTS, Compile, Dtype, Fill, Guesses, Mode

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
    pool: bool | None = None,
    candidates: int = 1,
    compile: Compile | None = None,
    guesses: Guesses = Guesses.adaptive,
) -> JacobiConfig:
    """The options as a validated `JacobiConfig`."""
    from ..decoding import JacobiConfig

    if mode is Mode.block:
        sliding = {
            f"--lookup {lookup}": bool(lookup),
            "--pool": bool(pool),
            f"--candidates {candidates}": candidates > 1,
            f"--guesses {guesses}": guesses is not Guesses.adaptive,
            "--block-size auto": block_size == "auto",
        }
        for option in (name for name, given in sliding.items() if given):
            raise CommandError(f"{option} needs --mode sliding: a block keeps its own guesses")
    if block_size == "auto" and verify_size is not None:
        raise CommandError("--block-size auto chooses the verify size, too; leave --verify-size")
    if block_size == "auto" and candidates > 1:
        raise CommandError(
            f"--block-size auto times single windows; leave it or --candidates {candidates}"
        )
    if block_size == "auto" and compile is Compile.inductor:
        raise CommandError(
            "--block-size auto times windows of many sizes; give a number with --compile inductor"
        )
    if candidates > 1 and verify_size is not None:
        raise CommandError(
            f"--candidates {candidates} are all checked whole; leave --verify-size out"
        )
    return JacobiConfig(
        block_size=block_size,
        mode=mode.value,
        fill=fill.value,
        seed=seed,
        record_trajectories=record,
        verify_size=verify_size,
        lookup=lookup,
        pool=pool,
        candidates=candidates,
        compile=None if compile is None else compile.value,
        guesses=guesses.value,
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
        chosen, limit = shipped_prompts(), limit or SHIPPED_PROMPTS
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
