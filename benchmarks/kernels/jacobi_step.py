"""One fixed-point step of a decoding batch: one launch beside a dozen.

A step takes microseconds, so a sample is a whole decoding of `CALLS` steps from the same first
state: at each step the window meets other predictions, of which 1 to n are accepted. The state is
put back outside the measured time. On a GPU the same steps are also replayed as a CUDA graph, which
is how a decoding loop runs them; without a graph the time is that of Python's launches.

    python benchmarks/kernels/jacobi_step.py --device cpu --record
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
from cllm_kernels.jacobi_step import OP, reference

SIZES = [(8, 64), (1, 16), (64, 32)]  # (B, n)
QUICK = [(2, 8)]
CALLS = 64
STATE = ("window", "output", "lengths", "generated", "progress", "done")
ORDER = (
    *("window", "predictions", "output", "lengths", "generated", "progress", "done", "limits"),
    *("stop_ids", "fill"),
)


def first_state(rows: int, n: int, device: torch.device) -> dict[str, Tensor]:
    capacity = CALLS * n

    def column(value: int) -> Tensor:
        return torch.full((rows,), value, device=device)

    return {
        "window": torch.randint(3, 1000, (rows, n), device=device),
        "output": torch.zeros(rows, capacity, dtype=torch.int64, device=device),
        "lengths": column(100),
        "generated": column(0),
        "progress": column(0),
        "done": torch.zeros(rows, dtype=torch.bool, device=device),
        "limits": column(capacity),
        "stop_ids": torch.tensor([0, 1], device=device),
        "fill": torch.randint(3, 1000, (rows, capacity + n), device=device),
    }


def decoding(rows: int, n: int) -> Callable[[torch.device], Inputs]:
    """The first state, and for every step predictions that confirm 0 to n - 1 of the guesses."""

    def make(device: torch.device) -> Inputs:
        first = first_state(rows, n, torch.device("cpu"))
        state = {name: value.clone() for name, value in first.items()}
        steps = []
        for _ in range(CALLS):
            window = state["window"]
            other = torch.randint(2000, 3000, window.shape)
            confirmed = torch.arange(n) < torch.randint(0, n, (rows, 1))
            following = torch.cat([window[:, 1:], other[:, :1]], dim=1)
            state["predictions"] = torch.where(confirmed, following, other)
            steps.append(state["predictions"].to(device))
            reference.jacobi_step(*(state[name] for name in ORDER), "sliding", "all")
        assert not state["done"].any() and int(state["generated"].min()) >= CALLS
        return {"first": {k: v.to(device) for k, v in first.items()}, "steps": steps}

    return make


def eager(step: Callable[..., Tensor]) -> Callable[[Inputs], Run]:
    """All steps one after the other; returns what the last one leaves."""

    def build(inputs: Inputs) -> Run:
        return Run(*steps(step, inputs), calls=CALLS)

    return build


def steps(
    step: Callable[..., Tensor], inputs: Inputs
) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], None]]:
    first = inputs["first"]
    state = {name: value.clone() for name, value in first.items()}
    arguments = [
        tuple(predictions if name == "predictions" else state[name] for name in ORDER)
        for predictions in inputs["steps"]
    ]

    def call() -> tuple[Tensor, ...]:
        for step_arguments in arguments:
            step(*step_arguments)
        return tuple(state[name] for name in STATE)

    def prepare() -> None:
        for name in STATE:
            state[name].copy_(first[name])

    return call, prepare


def written_out(*arguments: Tensor) -> Tensor:
    return reference.jacobi_step(*arguments, "sliding", "all")


def case(rows: int, n: int, device: torch.device) -> Case:
    # window and predictions read, window written; the row's state; one token or more committed
    moved = 8 * rows * (3 * n + 2 * 3 + 1 + 1) + 2 * rows + 16
    return Case(
        name=f"B={rows} n={n}",
        dtype=torch.float32,  # of the ceiling only: the op has no floating-point number
        shape={"B": rows, "n": n, "steps": CALLS},
        make_inputs=decoding(rows, n),
        variants=launch_variants(OP, device, eager, written_out, cllm_kernels.jacobi_step, moved),
        flop_floor=0,
        bytes_floor=moved,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [case(rows, n, device) for rows, n in (QUICK if quick else SIZES)]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("jacobi_step", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
