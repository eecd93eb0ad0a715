"""What a kernel benchmark is made of: cases (a shape, a dtype) and the variants that run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cllm_kernels._backend import BACKENDS, Op

# Tensors and numbers of a case, by name; every variant of it runs on the same ones.
Inputs = dict[str, Any]


@dataclass
class Run:
    """A variant made ready on a case's inputs.

    `call` returns the results (a tensor or a tuple of tensors) and makes `calls` calls of the op;
    `prepare` puts back what it changed, outside the time that is measured.
    """

    call: Callable[[], Any]
    prepare: Callable[[], None] | None = None
    calls: int = 1
    notes: dict[str, Any] = field(default_factory=dict)  # what a build chose, for the record


@dataclass
class Variant:
    """One way to compute a case.

    kind is "cllm" (this package), "baseline" (what a user would take instead) or "matmuls" (the
    case's matrix products and nothing else, no result of their own). `flop` and `bytes` are what
    this variant itself does per call of the op, as far as its formula says; `unavailable` says why
    it cannot run here, and then `build` is never called.
    """

    name: str
    kind: str
    build: Callable[[Inputs], Run]
    flop: int
    bytes: int
    backend: str | None = None
    unavailable: str | None = None
    compared: bool = True  # whether its results should equal those of the first variant


@dataclass
class Case:
    """A shape in a dtype: what is computed, its floors, and the variants that compute it."""

    name: str
    dtype: torch.dtype
    shape: dict[str, Any]
    make_inputs: Callable[[torch.device], Inputs]
    variants: list[Variant]
    flop_floor: int  # the least that any way to compute it must do
    bytes_floor: int  # inputs read once and results written once
    # How far results may lie apart (see `distance` in harness.py) before a variant counts as wrong.
    tolerance: float = 0.0


def itemsize(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def short(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[
        str(dtype).removeprefix("torch.")
    ]


def own_variants(
    op: Op, device: torch.device, build: Callable[[Inputs], Run], flop: int, bytes: int
) -> list[Variant]:
    """This package's op: "auto" and every backend it has, those that cannot run with the reason."""
    variants = []
    for backend in ("auto", *(name for name in BACKENDS if name in op.implementations)):
        reason = None if backend == "auto" else op.unavailable(backend, device)
        variants.append(
            Variant(f"cllm {backend}", "cllm", build, flop, bytes, backend, unavailable=reason)
        )
    return variants


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for these very shapes, all of the function in one graph or an error."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def captured(run: Run) -> Run:
    """The same calls as one CUDA graph: captured once, on what is there now, and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles what needs compiling, outside the capture
        if run.prepare is not None:
            run.prepare()
        run.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run.call()

    def replay() -> Any:
        graph.replay()
        return results

    return Run(replay, run.prepare, calls=run.calls)


def launch_variants(
    op: Op,
    device: torch.device,
    eager: Callable[[Callable[..., Any]], Callable[[Inputs], Run]],
    written_out: Callable[..., Any],
    ours: Callable[..., Any],
    bytes: int,
) -> list[Variant]:
    """Those of an op that has nothing to multiply: written out in torch, compiled, and ours; on a
    GPU both once more as a graph, which is how a decoding loop runs them.

    Args:
        eager: makes the runs of a function.
    """

    def graphed(function: Callable[..., Any]) -> Callable[[Inputs], Run]:
        return lambda inputs: captured(eager(function)(inputs))

    variants = [
        Variant("written out in torch", "baseline", eager(written_out), 0, bytes),
        Variant("compiled, written out", "baseline", eager(compiled(written_out)), 0, bytes),
        *own_variants(op, device, eager(ours), 0, bytes),
    ]
    if device.type == "cuda":
        variants.append(
            Variant("written out, in a graph", "baseline", graphed(written_out), 0, bytes)
        )
        for variant in own_variants(op, device, graphed(ours), 0, bytes):
            variant.name += ", in a graph"
            variants.append(variant)
    return variants


def matmuls_variant(
    name: str,
    shapes: list[tuple[str, int, int, int]],  # (layout, m, k, n) of each product, in order
    dtype: torch.dtype,
    device: torch.device,
) -> Variant:
    """Exactly these matrix products, one after the other, by torch.mm into storage given to it.

    The layout's letters say how [m, k] and [k, n] lie in memory: "n" as written, "t" transposed.
    """

    def build(_: Inputs) -> Run:
        operands: dict[tuple[str, int, int, int], tuple[torch.Tensor, ...]] = {}
        for layout, m, k, n in shapes:
            if (layout, m, k, n) not in operands:
                operands[layout, m, k, n] = (
                    _matrix(layout[0], m, k, dtype, device),
                    _matrix(layout[1], k, n, dtype, device),
                    torch.empty(m, n, device=device, dtype=dtype),
                )

        def call() -> None:
            for shape in shapes:
                left, right, out = operands[shape]
                torch.mm(left, right, out=out)

        return Run(call)

    flop = sum(2 * m * k * n for _, m, k, n in shapes)
    moved = sum(m * k + k * n + m * n for _, m, k, n in shapes) * itemsize(dtype)
    return Variant(name, "matmuls", build, flop, moved, compared=False)


def _matrix(
    order: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if order == "t":
        return torch.randn(columns, rows, device=device, dtype=dtype).t()
    return torch.randn(rows, columns, device=device, dtype=dtype)
