"""LoRA adapters through PEFT: put on before training, merged for those who want a plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arguments import ConsistencyTrainingArguments

_NEEDS_PEFT = "LoRA needs the package peft; pip install 'cllm-kernels[train]'"


def is_peft(model: Any) -> bool:
    """Whether `model` is a PEFT model."""
    return hasattr(model, "peft_config") and callable(getattr(model, "disable_adapter", None))


def add_adapters(model: Any, args: ConsistencyTrainingArguments) -> Any:
    """A PEFT model around `model`, with the adapters that `args` ask for.

    Raises:
        ValueError: if peft is not installed, no module has one of the names asked for, or
            ``args.lora_from`` holds no adapters that fit `model`.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(_NEEDS_PEFT) from error
    if args.lora_from is not None:
        return _started_from(model, Path(args.lora_from))
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha if args.lora_alpha is not None else 2 * args.lora_r,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"lora_targets {args.lora_targets!r}: {error}") from error


@contextmanager
def without_input_casts(layers: list[Any]) -> Iterator[None]:
    """Under autocast, PEFT's layers turn their inputs into fp32, the dtype of their weights, only
    for autocast to turn them back.

    Args:
        layers: of PEFT (`lora_layers`).
    """
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


def lora_layers(model: Any, args: ConsistencyTrainingArguments) -> list[Any]:
    """The layers of `model` whose inputs autocast casts; none where it does not, or not always:
    checkpointed layers run again in the backward pass."""
    checkpointed = args.gradient_checkpointing or getattr(model, "is_gradient_checkpointing", False)
    if not (args.bf16 or args.fp16) or checkpointed or not is_peft(model):
        return []
    return [layer for layer in model.modules() if hasattr(layer, "cast_input_dtype_enabled")]


def _started_from(model: Any, folder: Path) -> Any:
    """A PEFT model whose adapters go on from those in `folder`.

    Raises:
        ValueError: if there are none, or they do not fit `model`.
    """
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"lora_from: {folder} holds no adapter of PEFT's format (no adapter_config.json)"
        )
    try:
        # trained in fp32, whatever they are stored in: PEFT's autocast_adapter_dtype
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"lora_from: the adapter in {folder} does not fit: {reason}") from error


def merged(model: Any) -> Any:
    """A copy of a PEFT model with its adapters merged into the weights, as a transformers model.

    `model` stays as it is: merging and taking apart again would round its weights.
    """
    return copy.deepcopy(model).merge_and_unload()
