"""What a call of a small op costs beyond its kernel: per op the whole call, the bare native call
with ready-made integers, the allocation of its outputs, and what is left of the first for Python.

Sizes are tiny or rows are done, so that the kernel itself takes next to nothing. Variants are timed
in turns, each number is the median over the rounds of a mean over many calls.

    python benchmarks/kernels/overhead.py [--rounds 200]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import cllm_kernels
from cllm_kernels._common import DTYPE_CODES
from cllm_kernels._native import missing_reason, native_module
from cllm_kernels.jacobi_step import native as jacobi_native
from cllm_kernels.linear_argmax import OP as LINEAR_ARGMAX
from cllm_kernels.linear_argmax import native as linear_native

CALLS = 500
Variants = dict[str, Callable[[], object]]


def jacobi_step(rows: int = 8, n: int = 64) -> Variants:
    """Every row commits one token; the state is put back before each call, in all variants."""
    column = torch.zeros(rows, dtype=torch.int64)
    window = torch.randint(9, 99, (rows, n))
    state = (
        *(window, torch.zeros_like(window), torch.zeros((rows, 4096), dtype=torch.int64)),
        *(column.clone(), column.clone(), column.clone(), column.bool(), column + 4000),
        *(torch.tensor([3]), torch.zeros((rows, 4200), dtype=torch.int64)),
    )
    generated, accepted = state[4], torch.empty_like(column)
    numbers = jacobi_native._arguments(*state, accepted, "sliding", "all")
    native = native_module()

    def call() -> object:
        generated.zero_()
        return cllm_kernels.jacobi_step(*state)

    def bare(kept: object = accepted) -> object:  # its address is among the numbers
        generated.zero_()
        return native.jacobi_step_cpu(*numbers, 1)

    return {
        "call": call,
        "native": bare,
        "outputs": lambda: torch.empty_like(column),
        "state": generated.zero_,
    }


def row_argmax(rows: int = 1, columns: int = 16) -> Variants:
    logits = torch.randn(rows, columns)
    index, value = cllm_kernels.row_argmax(logits)
    numbers = (
        *(logits.data_ptr(), DTYPE_CODES[logits.dtype], rows, rows, 0, columns, columns),
        *(index.data_ptr(), value.data_ptr(), 1),
    )
    native = native_module()
    return {
        "call": lambda: cllm_kernels.row_argmax(logits),
        "native": lambda kept=(index, value): native.row_argmax_cpu(*numbers),
        "outputs": lambda: torch.empty_like(
            torch.empty(rows, dtype=torch.int64), dtype=torch.float32
        ),
    }


def linear_argmax(rows: int = 1, vocabulary: int = 16, width: int = 8) -> Variants:
    """Its implementation is a loop around torch's matmul, whose time wavers by more than what is
    looked for: an idle one takes its place to tell what comes before it."""
    hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width)
    rest = (None, None, None, None, None, None)
    cllm_kernels.linear_argmax(hidden, weight)
    resolved, key = LINEAR_ARGMAX._resolved, (cllm_kernels.current_backend(), hidden.device)
    implementation = resolved[key]

    def idle(*_: object) -> None: ...

    def python() -> None:
        resolved[key] = idle
        cllm_kernels.linear_argmax(hidden, weight)
        resolved[key] = implementation

    return {
        "call": lambda: cllm_kernels.linear_argmax(hidden, weight),
        "native": lambda: linear_native.linear_argmax_cpu(hidden, weight, *rest),
        "python": python,
    }


OPS: dict[str, Callable[[], Variants]] = {
    "jacobi_step": jacobi_step,
    "row_argmax": row_argmax,
    "linear_argmax": linear_argmax,
}


def measure(rounds: int = 200, ops: tuple[str, ...] = tuple(OPS)) -> dict[str, dict[str, float]]:
    """Microseconds per op: {op: {"call", "native", "outputs", "python", ...}}."""
    if reason := missing_reason():
        raise SystemExit(f"nothing to measure: {reason}")
    variants = {op: OPS[op]() for op in ops}
    samples: dict[tuple[str, str], list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for round_ in range(rounds + 2):  # two to warm up
        for op, functions in variants.items():
            for name, function in functions.items():
                begin = time.perf_counter()
                for _ in range(CALLS):
                    function()
                took = (time.perf_counter() - begin) / CALLS * 1e6
                if round_ >= 2:
                    samples.setdefault((op, name), []).append(took)
    torch.set_num_threads(threads)
    report: dict[str, dict[str, float]] = {op: {} for op in ops}
    for (op, name), values in samples.items():
        report[op][name] = statistics.median(values)
    for numbers in report.values():
        state = numbers.get("state", 0.0)
        numbers["call"] -= state
        numbers["native"] -= state
        rest = numbers["call"] - numbers["native"] - numbers.get("outputs", 0.0)
        numbers.setdefault("python", rest)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    report = measure(parser.parse_args().rounds)
    print(f"{'op':14}{'call':>9}{'native':>9}{'outputs':>9}{'python':>9}   microseconds")
    for op, numbers in report.items():
        cells = [numbers.get(name, 0.0) for name in ("call", "native", "outputs", "python")]
        print(f"{op:14}" + "".join(f"{cell:9.2f}" for cell in cells))


if __name__ == "__main__":
    main()
