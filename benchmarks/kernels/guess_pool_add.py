"""What a forward predicted, put into the pool of guesses: one launch beside a handful.

A call takes microseconds, so a sample is `CALLS` of them, each with the stamps that the one before
has left. On a GPU the same calls are also replayed as a CUDA graph, as a decoding loop runs them.

    python benchmarks/kernels/guess_pool_add.py --device cpu --record
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
from benchmarks.kernels.cases import Case, Inputs, Run, launch_variants
from benchmarks.kernels.harness import main
from cllm_kernels.guess_pool_add import OP, reference

SIZES = [(1, 4, 49152), (8, 16, 49152), (64, 16, 16384)]  # (B, n, V)
QUICK = [(2, 4, 97)]
CALLS = 32


def state(rows: int, n: int, vocabulary: int) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        return {
            "latest": torch.full((rows, vocabulary), -1, device=device),
            "stamps": torch.zeros(rows, dtype=torch.int64, device=device),
            "window": torch.randint(0, vocabulary, (rows, n)).to(device),
            "predictions": torch.randint(0, vocabulary, (rows, n)).to(device),
        }

    return make


def eager(add: Callable[..., None]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        mutated = [inputs["latest"].clone(), inputs["stamps"].clone()]
        tokens = inputs["window"], inputs["predictions"]

        def call() -> tuple[Tensor, ...]:
            for _ in range(CALLS):
                add(*mutated, *tokens)
            return tuple(mutated)

        def prepare() -> None:
            mutated[0].copy_(inputs["latest"])
            mutated[1].copy_(inputs["stamps"])

        return Run(call, prepare, calls=CALLS)

    return build


def case(rows: int, n: int, vocabulary: int, device: torch.device) -> Case:
    # two tokens read and an entry read and written for every place, and the stamps
    moved = 8 * rows * (4 * n + 2)
    written_out, op = reference.guess_pool_add, cllm_kernels.guess_pool_add
    return Case(
        name=f"B={rows} n={n}",
        dtype=torch.float32,  # of the ceiling only: the op has no floating-point number
        shape={"B": rows, "n": n, "V": vocabulary, "calls": CALLS},
        make_inputs=state(rows, n, vocabulary),
        variants=launch_variants(OP, device, eager, written_out, op, moved),
        flop_floor=0,
        bytes_floor=moved,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [case(*sizes, device) for sizes in (QUICK if quick else SIZES)]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("guess_pool_add", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
