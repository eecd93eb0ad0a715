"""The norm of Llama's layers: ours beside HuggingFace's formula, eager and compiled.

python benchmarks/kernels/rms_norm.py --device cpu --record
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import cllm_kernels
from benchmarks.kernels.cases import (
    Case,
    Inputs,
    Run,
    Variant,
    compiled,
    itemsize,
    own_variants,
    short,
)
from benchmarks.kernels.harness import main
from cllm_kernels.rms_norm import OP

EPS = 1e-5
# rows of hidden states: a window of 16 positions, alone and for a batch of eight
CPU = [(16, 576), (128, 576)]
CUDA = [(16, 4096), (128, 4096)]
QUICK = [(4, 72)]


def by_steps(x: Tensor, weight: Tensor) -> Tensor:
    """HuggingFace's LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return cllm_kernels.rms_norm(x, weight, eps=EPS)


def case(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    def inputs(device: torch.device) -> Inputs:
        return {
            "x": torch.randn(rows, width, device=device).to(dtype),
            "weight": torch.randn(width, device=device).to(dtype),
        }

    def build(function: Any) -> Any:
        return lambda inputs: Run(lambda: function(inputs["x"], inputs["weight"]))

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (width,), weight, EPS)

    flop = 4 * rows * width
    moved = (2 * rows + 1) * width * itemsize(dtype)
    return Case(
        name=f"{short(dtype)} [{rows}, {width}]",
        dtype=dtype,
        shape={"rows": rows, "H": width},
        make_inputs=inputs,
        variants=[
            Variant("HuggingFace's steps", "baseline", build(by_steps), flop, moved),
            # rounds once where the model rounds twice
            Variant("torch rms_norm", "baseline", build(torchs), flop, moved),
            Variant("compiled steps", "baseline", build(compiled(by_steps)), flop, moved),
            *own_variants(OP, device, build(ours), flop, moved),
        ],
        flop_floor=flop,
        bytes_floor=moved,
        tolerance=1e-5 if dtype is torch.float32 else 1e-2,  # sums in another order, one rounding
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = QUICK if quick else CUDA if device.type == "cuda" else CPU
    return [
        case(rows, width, dtype, device)
        for rows, width in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("rms_norm", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
