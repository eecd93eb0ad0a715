"""The language-model head as the drivers multiply by it, and products that are summed in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from cllm_kernels._matmul import fast_cpu_matmul
from cllm_kernels.linear_consistency_loss.options import Operands

# Rows of the weight that are multiplied at once for logits on a CPU: torch's fp32 matmul of 256
# rows is faster in such pieces than whole (158 against 136 GFLOP/s for H = 576 on two AVX2 cores).
# 16-bit weights without matrix instructions are widened to fp32 in the same pieces.
_CPU_PIECE = 2048


class Head:
    """The language-model head as the matmuls see it: whole, or widened piece by piece."""

    def __init__(self, weight: Tensor, bias: Tensor | None, piece: int | None = None):
        """piece: the longest piece; None: as long as the matmuls like it."""
        self.weight = weight  # [V, H]
        self.dtype = weight.dtype
        self.piece = min(piece or weight.shape[0], weight.shape[0])
        self.widened: Tensor | None = None
        if weight.device.type == "cpu":
            widen = weight.dtype is not torch.float32 and not fast_cpu_matmul(weight.dtype)
            if widen or weight.dtype is torch.float32:
                self.piece = min(_CPU_PIECE, self.piece)
            if widen:
                self.dtype = torch.float32
                self.widened = torch.empty(
                    self.piece, weight.shape[1], dtype=torch.float32, device="cpu"
                )
        self.bias = None if bias is None else bias.to(self.dtype)  # [V]

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns of the logits, those rows of the weight)."""
        for first in range(0, self.weight.shape[0], self.piece):
            columns = slice(first, min(first + self.piece, self.weight.shape[0]))
            part = self.weight[columns]
            if self.widened is not None:
                part = self.widened[: len(part)].copy_(part)
            yield columns, part

    def largest_pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The same in as few pieces as can be, for products that gain nothing from small ones."""
        if self.widened is not None:
            yield from self.pieces()
        else:
            yield slice(0, self.weight.shape[0]), self.weight

    def multiply(self, hidden: Tensor, columns: slice, part: Tensor, out: Tensor) -> None:
        """hidden [R, H] @ part.T + bias into out [R, W], for one of the pieces."""
        if self.bias is None:
            torch.mm(hidden, part.t(), out=out)
        else:
            torch.addmm(self.bias[columns], hidden, part.t(), out=out)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """hidden [R, H] @ weight.T + bias into out [R, V]."""
        for columns, part in self.pieces():
            self.multiply(hidden, columns, part, out[:, columns])


class Heads:
    """The head of the students, and that of the teachers: the same, or another model's."""

    def __init__(self, operands: Operands, piece: int | None = None):
        self.own = Head(operands.weight, operands.bias, piece)
        self.other: Head | None = None
        if operands.teacher_weight is not None:
            self.other = Head(operands.teacher_weight, operands.teacher_bias, piece)

    def logits(self, hidden: Tensor, others: Tensor, out: Tensor) -> None:
        """Whole rows of logits [R, V] of the rows of `hidden`, which our head multiplies, and
        behind them of `others`, which are the other head's."""
        self.own.logits(hidden, out[: len(hidden)])
        if self.other is not None:
            self.other.logits(others, out[len(hidden) :])

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(columns of the logits, those rows of our weight, those of the other head's)."""
        if self.other is None:
            for columns, part in self.own.pieces():
                yield columns, part, None
            return
        for (columns, part), (_, other) in zip(self.own.pieces(), self.other.pieces(), strict=True):
            yield columns, part, other

    def multiply(
        self,
        hidden: Tensor,  # [R, H]
        others: Tensor,  # [Q, H2]
        columns: slice,
        part: Tensor,  # [W, H]
        other_part: Tensor | None,  # [W, H2]
        out: Tensor,  # [R + Q, W]
    ) -> None:
        """`logits` for one of the pieces."""
        self.own.multiply(hidden, columns, part, out[: len(hidden)])
        if self.other is not None and other_part is not None:
            self.other.multiply(others, columns, other_part, out[len(hidden) :])


def add_product(
    total: Tensor,  # [V, H] float32, mutated
    left: Tensor,  # [V, R]
    right: Tensor,  # [R, H]
    *,
    first: bool = False,
) -> None:
    """total += left @ right, summed and kept in fp32 whatever the operands' dtype.

    The first product is written, whatever total held: that spares a sweep of zeros.
    """
    if first and left.dtype is torch.float32:
        torch.mm(left, right, out=total)
        return
    if first:
        total.zero_()
    if left.dtype is torch.float32:
        total.addmm_(left, right)
    elif total.device.type == "cpu":
        total += left @ right
    elif _adds_in_fp32(total.device):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


@cache
def _adds_in_fp32(device: torch.device) -> bool:
    """Whether this torch adds a 16-bit product to an fp32 matrix; some want equal dtypes."""
    small = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(small, small.half(), small.half(), out_dtype=torch.float32, out=small)
    except RuntimeError:
        return False
    return True
