"""Folders that training leaves: replaced whole or not at all, with the recipe inside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import write_atomically

RECIPE_FILE = "cllm_recipe.json"
STATE_FILE = "cllm_trainer.json"
_COMPLETE = "trainer_state.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the message says why."""


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
    write_atomically(path, text.encode("utf-8"))


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its place at the end.

    At every moment either `target` or one of its neighbours is a whole folder, and
    `recover_folder` finds which, so a crash loses neither the old nor the new content.
    """
    recover_folder(target)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    ready, old = _ready(target), _old(target)
    os.rename(part, ready)
    if target.exists():
        os.rename(target, old)
    os.rename(ready, target)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Finish a replacement that `replaced_folder` was interrupted in."""
    ready, old = _ready(target), _old(target)
    if ready.exists():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(ready, target)
    elif not target.exists() and old.exists():
        os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _ready(target: Path) -> Path:
    return target.with_name(target.name + ".ready")


def _old(target: Path) -> Path:
    return target.with_name(target.name + ".old")


def last_checkpoint(output: str | os.PathLike[str]) -> Path | None:
    """The newest ``checkpoint-<step>`` in `output` that was written to its end; None without."""
    found: list[tuple[int, Path]] = []
    folder = Path(output)
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and _steps(path) is not None:
            found.append((int(step), path))
    return max(found)[1] if found else None


def _steps(checkpoint: Path) -> int | None:
    """Steps that were trained; None where the file that transformers writes last is not whole."""
    try:
        return int(json.loads((checkpoint / _COMPLETE).read_bytes())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_steps_left(checkpoint: Path, most: int) -> None:
    """Raises CheckpointError where `most` steps are trained already; 0 or less: no such limit."""
    done = _steps(checkpoint)
    if done is not None and 0 < most <= done:
        raise CheckpointError(
            f"{checkpoint} has all {most} steps of the run; raise max_steps to train on"
        )


@contextmanager
def naming(checkpoint: str | os.PathLike[str] | None) -> Iterator[None]:
    """Errors of reading a checkpoint's files, raised as a CheckpointError that names it."""
    import torch

    try:
        yield
    except (ImportError, CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise  # of which no file is to blame
    except Exception as error:  # torch, safetensors and pickle have a kind of their own each
        reason = str(error).strip().splitlines() or ["no message"]
        raise CheckpointError(
            f"{checkpoint} cannot be read ({type(error).__name__}: {reason[0]}); "
            "resume from an earlier one"
        ) from error


class NamedCheckpoints:
    """Of a transformers Trainer: what fails in reading a checkpoint names it."""

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        with naming(checkpoint):
            super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with naming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with naming(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


def checkpoint_to_resume(given: str | bool | None, output: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means: a folder, or True for the newest one.

    Raises:
        CheckpointError: if there is none, or the folder is not a whole checkpoint.
    """
    if given is None or given is False:
        return None
    if given is True:
        found = last_checkpoint(output)
        if found is None:
            raise CheckpointError(
                f"there is no checkpoint to resume from in {os.fspath(output)}; "
                "start without resuming"
            )
        return found
    path = Path(given)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    if _steps(path) is None:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: it has no {_COMPLETE}, or a damaged one; "
            "resume from an earlier one"
        )
    return path


def read_tensors(checkpoint: Path, name: str, what: str) -> dict[str, Any]:
    """The tensors that a run with the same `what` (a setting, in words) wrote to file `name`.

    Raises:
        CheckpointError: if there is no such file.
    """
    import torch

    path = checkpoint / name
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} has no {name}: it was trained with another {what}")
    with naming(checkpoint):
        found: dict[str, Any] = torch.load(path, map_location="cpu")
    return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `ConsistencyTrainer` keeps beside transformers' own files.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} has no {STATE_FILE}: it is not a checkpoint of consistency training"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict) or not {"meter", "quality"} <= set(state):
        raise CheckpointError(f"{path} is damaged: it does not hold the state of a training")
    return state
