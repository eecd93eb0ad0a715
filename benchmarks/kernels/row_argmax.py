"""Index and value of every row's largest logit: ours beside torch's argmax, eager and compiled.

python benchmarks/kernels/row_argmax.py --device cpu --record
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
from cllm_kernels.row_argmax import OP

# rows of logits: a window of 16 positions, alone and for a batch of eight
CPU = [(16, 49152), (128, 49152)]
CUDA = [(16, 128256), (128, 128256), (512, 128256)]
QUICK = [(4, 1021)]


def argmax_and_gather(logits: Tensor) -> tuple[Tensor, Tensor]:
    index = logits.argmax(dim=-1)
    return index, logits.gather(-1, index[:, None])[:, 0]


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    value, index = logits.max(dim=-1)
    return index, value


def case(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Case:
    read = rows * vocabulary * itemsize(dtype)
    written = rows * (8 + itemsize(dtype))

    def inputs(device: torch.device) -> Inputs:
        return {"logits": torch.randn(rows, vocabulary, device=device).to(dtype)}

    def build(function: Any) -> Any:
        return lambda inputs: Run(lambda: function(inputs["logits"]))

    moved = read + written
    fused = build(compiled(argmax_and_gather))
    return Case(
        name=f"{short(dtype)} [{rows}, {vocabulary}]",
        dtype=dtype,
        shape={"rows": rows, "V": vocabulary},
        make_inputs=inputs,
        variants=[
            Variant("torch argmax + gather", "baseline", build(argmax_and_gather), 0, moved),
            # one pass in torch too; it may pick another index among equal values
            Variant("torch max", "baseline", build(largest), 0, moved, compared=False),
            Variant("compiled argmax + gather", "baseline", fused, 0, moved),
            *own_variants(OP, device, build(cllm_kernels.row_argmax), 0, moved),
        ],
        flop_floor=0,
        bytes_floor=moved,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = QUICK if quick else CUDA if device.type == "cuda" else CPU
    return [
        case(rows, vocabulary, dtype, device)
        for rows, vocabulary in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("row_argmax", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
