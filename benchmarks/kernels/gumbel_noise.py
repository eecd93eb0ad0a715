"""Gumbel noise for every entry of the vocabulary: counter-based beside torch's own generator.

torch's noise depends on the state of a generator, ours on (seed, row, position, entry) alone: the
numbers differ and only the cost is compared.

    python benchmarks/kernels/gumbel_noise.py --device cpu --record
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import cllm_kernels
from benchmarks.kernels.cases import Case, Inputs, Run, Variant, compiled, own_variants
from benchmarks.kernels.harness import main
from cllm_kernels.gumbel_noise import OP

CPU = [(16, 49152)]
CUDA = [(16, 128256), (256, 128256)]
QUICK = [(3, 1021)]


def from_exponential(like: Tensor) -> Tensor:
    """-log of a standard exponential variate, as sampling code draws it."""
    return -torch.empty_like(like).exponential_().log()


def from_uniform(like: Tensor) -> Tensor:
    return -(-torch.rand_like(like).clamp_min(1e-20).log()).log()


def case(rows: int, vocabulary: int, device: torch.device) -> Case:
    moved = 4 * rows * vocabulary

    def inputs(device: torch.device) -> Inputs:
        numbers = torch.arange(rows, device=device)
        return {"row": numbers, "like": torch.ones(rows, vocabulary, device=device)}

    def drawn(function: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Run]:
        return lambda inputs: Run(lambda: function(inputs["like"]))

    def ours(inputs: Inputs) -> Run:
        row = inputs["row"]
        return Run(lambda: cllm_kernels.gumbel_noise(1, row, row, vocabulary))

    def baseline(name: str, function: Callable[[Tensor], Tensor], moved: int) -> Variant:
        return Variant(name, "baseline", drawn(function), 0, moved, compared=False)

    return Case(
        name=f"[{rows}, {vocabulary}]",
        dtype=torch.float32,
        shape={"rows": rows, "V": vocabulary},
        make_inputs=inputs,
        variants=[
            baseline("-log(exponential)", from_exponential, 5 * moved),
            baseline("-log(-log(uniform))", from_uniform, 11 * moved),
            baseline("compiled -log(-log(uniform))", compiled(from_uniform), moved),
            *own_variants(OP, device, ours, 0, moved),
        ],
        flop_floor=0,
        bytes_floor=moved,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = QUICK if quick else CUDA if device.type == "cuda" else CPU
    return [case(rows, vocabulary, device) for rows, vocabulary in shapes]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("gumbel_noise", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
