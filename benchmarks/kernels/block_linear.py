"""A linear layer for a block's few rows: ours beside torch's, over weights that no cache holds.

python benchmarks/kernels/block_linear.py --device cpu --record
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

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
from cllm_kernels.block_linear import OP

# (rows, layers, N, H): the gate projections of SmolLM2-135M, and of a model of 7B on a GPU. A call
# is one after the other, as a forward meets them, so that every weight comes from memory.
CPU = [(rows, 30, 1536, 576) for rows in (1, 4, 8, 16, 32, 64)]
# up-projections of GPT-2, whose weights lie across in memory: [H, N]
ACROSS = [(rows, 24, 3072, 768) for rows in (1, 4, 8, 16, 32, 64)]
# the gate projections of a model of 1B: all rows of x together are more than L1 holds
WIDE = [(rows, 4, 8192, 2048) for rows in (4, 8, 12, 16, 32)]
CUDA = [(rows, 4, 11008, 4096) for rows in (1, 16, 64)]
QUICK = [(5, 2, 60, 33)]
RANK = 32
DTYPES = (torch.float32, torch.bfloat16)
# relative, in the 2-norm: sums of H products in fp32, and one or two roundings
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}


def case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    gated: bool = False,
    across: bool = False,
) -> Case:
    rows, layers, columns, width = shape
    rank = RANK if gated else 0
    first = rows // 2

    def inputs(device: torch.device) -> Inputs:
        def random(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, device=device) * scale).to(dtype)

        return {
            "x": random(rows, width),
            "weights": [
                random(width, columns, scale=width**-0.5).t()
                if across
                else random(columns, width, scale=width**-0.5)
                for _ in range(layers)
            ],
            "pairs": [
                (random(rank, width, scale=width**-0.5), random(columns, rank, scale=rank**-0.5))
                for _ in range(layers if gated else 0)
            ],
        }

    def ours(inputs: Inputs) -> Run:
        x, weights, pairs = inputs["x"], inputs["weights"], inputs["pairs"]
        if gated:
            layered = list(zip(weights, pairs, strict=True))

            def call() -> Any:
                for weight, pair in layered:
                    out = cllm_kernels.block_linear(x, weight, low_rank=pair, gated_from=first)
                return out
        else:

            def call() -> Any:
                for weight in weights:
                    out = cllm_kernels.block_linear(x, weight)
                return out

        return Run(call)

    def eager(x: Tensor, weights: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        outs = []
        for number, weight in enumerate(weights):
            outs.append(linear(x, weight))
            if gated:
                a, b = pairs[number]
                outs[-1][first:].addmm_(linear(x[first:], a), b.t())
        return outs

    def torchs(function: Any) -> Any:
        return lambda inputs: Run(lambda: function(**inputs)[-1])

    gated_rows = rows - first if gated else 0
    flop = 2 * layers * (rows * width * columns + gated_rows * rank * (width + columns))
    numbers = columns * width + rows * (width + columns) + rank * (width + columns)
    moved = layers * numbers * itemsize(dtype)
    label = f"{short(dtype)} [{rows}, {width}] x {layers} of [{columns}, {width}]"
    return Case(
        name=label
        + (f", rank {rank} in half of the rows" if gated else "")
        + (", across" if across else ""),
        dtype=dtype,
        shape={
            "rows": rows,
            "layers": layers,
            "N": columns,
            "H": width,
            "rank": rank,
            "across": across,
        },
        make_inputs=inputs,
        variants=[
            Variant("torch linear", "baseline", torchs(eager), flop, moved),
            Variant("compiled torch linear", "baseline", torchs(compiled(eager)), flop, moved),
            *own_variants(OP, device, ours, flop, moved),
        ],
        flop_floor=flop,
        bytes_floor=moved,
        tolerance=TOLERANCE[dtype],
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = QUICK if quick else CUDA if device.type == "cuda" else CPU
    wide = [] if quick or device.type == "cuda" else WIDE
    plain = [case(shape, dtype, device) for dtype in DTYPES for shape in [*shapes, *wide]]
    pairs = [shape for shape in shapes if quick or shape[0] in (8, 16)]
    gated = [case(shape, dtype, device, gated=True) for dtype in DTYPES for shape in pairs]
    lying = [] if device.type == "cuda" else QUICK if quick else ACROSS
    across = [case(shape, dtype, device, across=True) for dtype in DTYPES for shape in lying]
    return plain + gated + across


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("block_linear", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
