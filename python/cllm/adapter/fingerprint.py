"""By what an adapter knows its base model again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ..traits import UnsupportedModelError, unwrapped

_VALUES = 64  # of each parameter


@torch.no_grad()
def base_fingerprint(model: Any) -> str:
    """SHA-256 of a model's parameter names, shapes and a sample of its weights.

    Of each parameter up to 64 values, at even distances, enter as bfloat16. So copies in fp32 and
    bf16 of the same weights agree, on every device, and so do a model and the same model inside of
    PEFT, whose adapters do not enter. Fine-tuned weights differ, unless every change is too small
    for bf16 or misses the sample. A copy in fp16 has been rounded once more and differs in general.

    Returns:
        64 hexadecimal digits.

    Raises:
        UnsupportedModelError: if weights are not in memory (offloaded to a meta device).
    """
    digest = hashlib.sha256()
    named = {}
    for name, parameter in unwrapped(model).named_parameters():
        plain = _base_name(name)
        if plain is not None:
            named[plain] = parameter
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for name in sorted(named):
        parameter = named[name]
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"the weights of {name} are not in memory (offloaded); load the model without "
                "offloading to use an adapter"
            )
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        values = parameter.detach().reshape(-1)
        stride = max(1, values.numel() // _VALUES)
        sample = values[::stride][:_VALUES].to(torch.bfloat16)
        samples.setdefault(parameter.device, []).append(sample)
    # one transfer a device; the order of devices must not matter, that of names does
    moved = {device: iter(torch.cat(parts).cpu().split([p.numel() for p in parts]))
             for device, parts in samples.items()}  # fmt: skip
    for name in sorted(named):
        part = next(moved[named[name].device])
        digest.update(part.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _base_name(name: str) -> str | None:
    """A parameter's name in the plain model, or None if PEFT added it."""
    parts = name.split(".")
    if any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))
