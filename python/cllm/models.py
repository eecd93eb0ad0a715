"""Load a model and its tokenizer by folder, by hub id, or the default one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import default_model
from .default_model import ModelError, quiet_transformers

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode.

    Attributes:
        name: what it was asked for by; `default_model.NAME` for the default.
        folder: where it was read from; None if the hub client chose the place.
        model: in eval mode, on its device.
        tokenizer: its tokenizer, padding on the left.
    """

    name: str
    folder: Path | None
    model: Any
    tokenizer: Any


def pick_device(name: str) -> torch.device:
    """The device called `name`; ``"auto"`` is CUDA where there is a device, else the CPU.

    Raises:
        ModelError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ModelError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ModelError(
                f"device {name!r} was asked for, but torch {torch.__version__} sees no CUDA device"
                " here; use --device cpu"
            )
        if (device.index or 0) >= count:
            raise ModelError(f"device {name!r} is not there; torch sees {count} CUDA device(s)")
    elif device.type != "cpu" and not getattr(torch, device.type).is_available():
        raise ModelError(f"device {name!r} was asked for, but torch sees none; use --device cpu")
    return device


def load_model(
    name: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: default_model.Progress | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: a folder, a Hugging Face hub id, or None for the default model.
        progress: hears of the default model's conversion, if it must happen
            (`default_model.ensure_converted`).

    Raises:
        ModelError: if it cannot be found or loaded, with the reason in one line.
    """
    folder: Path | None
    if name is None:
        folder = default_model.ensure_converted(progress)
        name = default_model.NAME
    else:
        folder = _local_folder(name)
    source = str(folder or name)
    with quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except Exception as error:
            # the loaders raise whatever a file, a config or the network makes them raise
            raise ModelError(_why_not_loaded(name, folder, error)) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(name, folder, model.eval().to(device), tokenizer)


def _local_folder(name: str) -> Path | None:
    """The folder that `name` means; None if it can only be a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {name} holds no model: it has no config.json")
        return path
    if path.is_file():
        raise ModelError(f"{name} is a file; give the model's folder")
    like_a_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith("/")
    if like_a_path:
        raise ModelError(f"there is no model folder {name}")
    return None


def _why_not_loaded(name: str, folder: Path | None, error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    if folder is not None:
        return f"cannot load the model in {name}: {first}"
    return (
        f"cannot load {name!r}: no folder of that name, and the Hugging Face hub did not give it "
        f"({first})"
    )
