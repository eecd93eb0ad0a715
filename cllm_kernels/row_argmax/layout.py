"""Rows behind two strides: how row_argmax's kernels address logits without copying them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowLayout(NamedTuple):
    """Row r of `logits` begins (r // inner) * outer_stride + (r % inner) * inner_stride in."""

    logits: Tensor
    rows: int
    inner: int
    outer_stride: int
    inner_stride: int
    columns: int


def row_layout(logits: Tensor) -> RowLayout:
    """The layout of logits [..., V]; copies only what two strides cannot address.

    A matrix, a slice such as logits[:, -n:, :] and anything contiguous need no copy.
    """
    if logits.dim() == 2:  # by far the most frequent
        rows, columns = logits.shape
        return RowLayout(logits, rows, max(rows, 1), 0, logits.stride(0), columns)
    columns = logits.shape[-1]
    if logits.is_contiguous():
        rows = 1
        for size in logits.shape[:-1]:
            rows *= size
        return RowLayout(logits, rows, max(rows, 1), 0, columns, columns)
    groups: list[list[int]] = []  # [size, stride] of the leading dimensions, innermost first
    for size, stride in zip(
        reversed(logits.shape[:-1]), reversed(logits.stride()[:-1]), strict=True
    ):
        if size == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1][0] *= size
        else:
            groups.append([size, stride])
    if len(groups) > 2:
        return row_layout(logits.contiguous())
    inner, inner_stride = groups[0] if groups else (1, 0)
    outer, outer_stride = groups[1] if len(groups) > 1 else (1, 0)
    return RowLayout(logits, outer * inner, max(inner, 1), outer_stride, inner_stride, columns)
