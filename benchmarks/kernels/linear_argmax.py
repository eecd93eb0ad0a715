"""The language-model head and its argmax: ours beside a matmul whose logits are then searched.

The floor is one read of the weight. "sampled" cases draw by Gumbel noise instead of taking the
argmax; torch has no counter-based noise, so there the two sides draw different tokens.

    python benchmarks/kernels/linear_argmax.py --device cpu --record
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
from benchmarks.kernels.cases import (
    Case,
    Inputs,
    Run,
    Variant,
    compiled,
    itemsize,
    matmuls_variant,
    own_variants,
    short,
)
from benchmarks.kernels.harness import main
from cllm_kernels.linear_argmax import OP

CPU = [(rows, 576, 49152) for rows in (1, 16, 64)]
CUDA = [(rows, 4096, 128256) for rows in (1, 16, 64, 256)]
QUICK = [(3, 32, 1021)]
SAMPLED = {"cpu": 16, "cuda": 64, "quick": 3}  # the number of rows that is also sampled
TEMPERATURE = 0.7


def matmul_argmax(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.t()  # [M, V]
    index = logits.argmax(dim=-1)
    return index, logits.gather(-1, index[:, None])[:, 0].float()


def matmul_gumbel(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.t()).float() / TEMPERATURE  # [M, V]
    noisy = logits - torch.empty_like(logits).exponential_().log()
    value, index = noisy.max(dim=-1)
    return index, value


def matmul_multinomial(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float() / TEMPERATURE
    return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]


def on_operands(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Inputs], Run]:
    return lambda inputs: Run(lambda: function(inputs["hidden"], inputs["weight"]))


def value_only(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """As `on_operands`; the value leads the results, which is what is compared.

    Where a 16-bit matmul rounds its output, tokens tie that do not, and the index may differ.
    """
    return on_operands(lambda hidden, weight: function(hidden, weight)[1])


def greedy(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> Case:
    flop = 2 * rows * width * vocabulary
    read = (rows + vocabulary) * width * itemsize(dtype)
    # logits written and read again
    through_logits = read + 2 * rows * vocabulary * itemsize(dtype)
    return Case(
        name=f"{short(dtype)} M={rows} H={width} V={vocabulary}",
        dtype=dtype,
        shape={"M": rows, "H": width, "V": vocabulary},
        make_inputs=operands(rows, width, vocabulary, dtype),
        variants=[
            Variant("matmul + argmax", "baseline", value_only(matmul_argmax), flop, through_logits),
            Variant(
                "compiled matmul + argmax",
                "baseline",
                value_only(compiled(matmul_argmax)),
                flop,
                through_logits,
            ),
            *own_variants(OP, device, value_only(cllm_kernels.linear_argmax), flop, read),
            matmuls_variant("matmul alone", [("nt", rows, width, vocabulary)], dtype, device),
        ],
        flop_floor=flop,
        bytes_floor=read + 12 * rows,
        tolerance=1e-4 if dtype is torch.float32 else 1e-2,
    )


def sampled(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> Case:
    flop = 2 * rows * width * vocabulary
    read = (rows + vocabulary) * width * itemsize(dtype)
    through_logits = read + 2 * rows * vocabulary * itemsize(dtype)
    row = torch.arange(rows, device=device)

    def ours(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return cllm_kernels.linear_argmax(
            hidden, weight, temperature=TEMPERATURE, noise=(1, row, row)
        )

    def baseline(name: str, function: Callable[..., Any]) -> Variant:
        return Variant(
            name, "baseline", on_operands(function), flop, through_logits, compared=False
        )

    return Case(
        name=f"{short(dtype)} M={rows} H={width} V={vocabulary} sampled",
        dtype=dtype,
        shape={"M": rows, "H": width, "V": vocabulary, "temperature": TEMPERATURE},
        make_inputs=operands(rows, width, vocabulary, dtype),
        variants=[
            baseline("matmul + Gumbel noise", matmul_gumbel),
            baseline("matmul + softmax + multinomial", matmul_multinomial),
            baseline("compiled Gumbel noise", compiled(matmul_gumbel)),
            *own_variants(OP, device, value_only(ours), flop, read),
            matmuls_variant("matmul alone", [("nt", rows, width, vocabulary)], dtype, device),
        ],
        flop_floor=flop,
        bytes_floor=read + 12 * rows,
        tolerance=1e-4 if dtype is torch.float32 else 1e-2,
    )


def operands(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype
) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        hidden = torch.randn(rows, width, device=device).to(dtype)
        weight = torch.randn(vocabulary, width, device=device, dtype=dtype).mul_(width**-0.5)
        return {"hidden": hidden, "weight": weight}

    return make


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = QUICK if quick else CUDA if device.type == "cuda" else CPU
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    found = [greedy(*shape, dtype, device) for dtype in dtypes for shape in shapes]
    rows = SAMPLED["quick" if quick else device.type]
    return found + [
        sampled(*shape, dtype, device) for dtype in dtypes for shape in shapes if shape[0] == rows
    ]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("linear_argmax", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
