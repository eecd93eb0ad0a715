"""The window behind a step, with an adapter's guesses in it: one launch beside a dozen.

A call takes a microsecond or few, so a sample is `CALLS` of them. On a GPU the same calls are also
replayed as a CUDA graph, which is how a decoding loop runs them.

    python benchmarks/kernels/draft_window.py --device cpu --record
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
from cllm_kernels.draft_window import OP, reference

SIZES = [(1, 4), (8, 16), (64, 16)]  # (B, n)
QUICK = [(2, 4)]
CALLS = 32
ORDER = ("checked", "guesses", "accepted", "generated", "fill")


def state(rows: int, n: int) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        made = {
            "checked": torch.randint(0, 97, (rows, n)),
            "guesses": torch.randint(0, 97, (rows, n)),
            "accepted": torch.randint(1, n + 1, (rows,)),
            "generated": torch.full((rows,), 3 * n),
            "fill": torch.randint(0, 97, (rows, 8 * n)),
        }
        return {name: tensor.to(device) for name, tensor in made.items()}

    return make


def written_out(window: Tensor, *rest: Tensor) -> None:
    reference.draft_window(window, *rest[:4], None, rest[4])


def op(window: Tensor, *rest: Tensor) -> None:
    cllm_kernels.draft_window(window, *rest[:4], fill=rest[4])


def eager(draft: Callable[..., None]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        window = torch.zeros_like(inputs["checked"])
        arguments = [inputs[name] for name in ORDER]

        def call() -> tuple[Tensor, ...]:
            for _ in range(CALLS):
                draft(window, *arguments)
            return (window,)

        return Run(call, lambda: None, calls=CALLS)

    return build


def case(rows: int, n: int, device: torch.device) -> Case:
    # a token and a guess or a fill read and one written for every place, three numbers a row
    moved = 8 * rows * (2 * n + 3)
    return Case(
        name=f"B={rows} n={n}",
        dtype=torch.float32,  # of the ceiling only: the op has no floating-point number
        shape={"B": rows, "n": n, "calls": CALLS},
        make_inputs=state(rows, n),
        variants=launch_variants(OP, device, eager, written_out, op, moved),
        flop_floor=0,
        bytes_floor=moved,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [case(*sizes, device) for sizes in (QUICK if quick else SIZES)]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("draft_window", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
