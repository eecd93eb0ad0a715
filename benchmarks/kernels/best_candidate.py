"""Of the windows that a forward has checked, the one with most right guesses: one launch beside a
dozen.

A call takes microseconds, so a sample is `CALLS` of them. On a GPU the same calls are also replayed
as a CUDA graph, which is how a decoding loop runs them.

    python benchmarks/kernels/best_candidate.py --device cpu --record
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
from cllm_kernels.best_candidate import OP, reference

SIZES = [(1, 2, 4), (8, 2, 16), (64, 4, 16)]  # (B, C, n)
QUICK = [(2, 2, 4)]
CALLS = 32


def state(rows: int, count: int, n: int) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        predictions = torch.randint(0, 2, (rows, count, n))  # half of the guesses are right
        windows = torch.randint(0, 2, (rows, count, n))
        return {"windows": windows.to(device), "predictions": predictions.to(device)}

    return make


def op(windows: Tensor, predictions: Tensor) -> tuple[Tensor, ...]:
    best, window, kept, _ = cllm_kernels.best_candidate(windows, predictions)
    return best, window, kept


def written_out(windows: Tensor, predictions: Tensor) -> tuple[Tensor, ...]:
    best, kept = reference.best_candidate(windows, predictions, None)
    return best, *kept


def eager(take: Callable[..., tuple[Tensor, ...]]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        def call() -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = ()
            for _ in range(CALLS):
                found = take(inputs["windows"], inputs["predictions"])
            return found

        return Run(call, lambda: None, calls=CALLS)

    return build


def case(rows: int, count: int, n: int, device: torch.device) -> Case:
    # windows and predictions read, a row of each written, and the number
    moved = 8 * rows * (2 * count * n + 2 * n + 1)
    return Case(
        name=f"B={rows} C={count} n={n}",
        dtype=torch.float32,  # of the ceiling only: the op has no floating-point number
        shape={"B": rows, "C": count, "n": n, "calls": CALLS},
        make_inputs=state(rows, count, n),
        variants=launch_variants(OP, device, eager, written_out, op, moved),
        flop_floor=0,
        bytes_floor=moved,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [case(*sizes, device) for sizes in (QUICK if quick else SIZES)]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("best_candidate", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
