"""linear_consistency_loss by sweeps over the vocabulary, which recompute instead of keeping.

Between the losses and their gradients only ten numbers a token are kept. Logits exist for a piece
of the vocabulary at a time, and a piece's rows of the weight's gradient are complete when the piece
is done: nothing of the weight's size is held in fp32, and nothing as long as a row of logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cllm_kernels.linear_consistency_loss.chunk import Chunk, Pass, Stage
from cllm_kernels.linear_consistency_loss.chunked import automatic_chunk
from cllm_kernels.linear_consistency_loss.head import Head, add_product
from cllm_kernels.linear_consistency_loss.options import (
    STATE_FIELDS,
    Gradients,
    LossOptions,
    Results,
    scales,
)

_PIECE = {"cpu": 4096, "cuda": 8192}  # rows of the weight in a piece
_LONGEST = {"cpu": 512, "cuda": 8192}  # tokens in a block


class _Sweep:
    """The operands of a call, cut into blocks of tokens and pieces of the vocabulary."""

    def __init__(
        self,
        student: Tensor,  # [M, H]
        teacher: Tensor,  # [M, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        labels: Tensor | None,  # [M]
        row_weights: Tensor | None,  # [M]
        options: LossOptions,
        state: Tensor,  # [M, STATE_FIELDS]
        in_place: Pass,
    ):
        self.options, self.state, self.in_place = options, state, in_place
        rows, device = len(student), student.device
        self.vocabulary = weight.shape[0]
        weights = torch.ones(rows, device=device) if row_weights is None else row_weights
        self.row_weights = weights.float().contiguous()
        self.labels = None if labels is None else labels.contiguous()
        self.normalisers, self.scales, self.common = scales(labels, row_weights, student, options)
        self.losses = torch.empty(2, rows, dtype=torch.float32, device=device)
        self.head = Head(weight, bias, _PIECE.get(device.type))
        size = options.chunk_tokens or automatic_chunk(
            rows, self.head.piece, self.head.dtype, device, _LONGEST
        )
        self.blocks = [slice(b, min(b + size, rows)) for b in range(0, rows, size)]
        # Student and teacher of a block behind each other: one matmul makes the logits of both.
        self.pairs = [
            torch.cat([student[block], teacher[block]]).to(self.head.dtype) for block in self.blocks
        ]
        longest = max((len(pair) for pair in self.pairs), default=0)
        self.buffer = torch.empty(longest * self.head.piece, dtype=self.head.dtype, device=device)

    def run(
        self, stage: Stage, student_gradient: bool = False, teacher_gradient: bool = False
    ) -> Iterator[tuple[slice, Tensor, int, Tensor]]:
        """Passes over all pieces and blocks; after each: (columns, that part of the weight, the
        block's number, logits or slopes [2C, W])."""
        for columns, part in self.head.pieces():
            for number, pair in enumerate(self.pairs):
                scores = self.buffer[: len(pair) * len(part)].view(len(pair), len(part))
                self.head.multiply(pair, columns, part, scores)
                self._pass(number, scores, columns.start, stage, student_gradient, teacher_gradient)
                yield columns, part, number, scores

    def finish(self) -> None:
        """The losses, from the state alone."""
        for number, pair in enumerate(self.pairs):
            nothing = self.buffer[:0].view(len(pair), 0)
            self._pass(number, nothing, 0, Stage.SLOPES, False, False)

    def _pass(
        self,
        number: int,
        scores: Tensor,  # [2C, W]
        first: int,
        stage: Stage,
        student_gradient: bool,
        teacher_gradient: bool,
    ) -> None:
        block = self.blocks[number]
        count = block.stop - block.start
        chunk = Chunk(
            scores[:count],
            scores[count:],
            self.row_weights[block],
            None if self.labels is None else self.labels[block],
            self.scales,
            self.losses[0, block],
            self.losses[1, block],
            student_gradient,
            teacher_gradient,
            stage,
            self.state[block],
            first,
            self.vocabulary,
        )
        self.in_place(chunk, self.options)


def losses(
    student: Tensor,  # [M, H]
    teacher: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor | None,  # [M]
    row_weights: Tensor | None,  # [M]
    options: LossOptions,
    in_place: Pass,
) -> Results:
    """The losses alone, and the state for `gradients`."""
    state = torch.zeros(len(student), STATE_FIELDS, dtype=torch.float64, device=student.device)
    state[:, [0, 2]] = -float("inf")  # the largest logits so far
    sweep = _Sweep(
        student, teacher, weight, bias, labels, row_weights, options, state, in_place
    )  # fmt: skip
    stages = [Stage.SUMS, *([Stage.DIVERGENCE] if options.divergence == "jsd" else [])]
    for stage in stages:
        for _ in sweep.run(stage):
            pass
    sweep.finish()
    consistency = sweep.losses[0].sum() * sweep.normalisers[0]
    ar = sweep.losses[1].sum() * sweep.normalisers[1]
    unwanted = [student.new_empty(0) for _ in Gradients._fields]
    loss = consistency + options.ar_weight * ar
    return Results._make((loss, consistency, ar, *unwanted, sweep.common, state))


def gradients(
    student: Tensor,  # [M, H]
    teacher: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor | None,  # [M]
    row_weights: Tensor | None,  # [M]
    options: LossOptions,
    wanted: Gradients,
    state: Tensor,  # [M, STATE_FIELDS], of `losses`
    d_loss: Tensor,  # []
    in_place: Pass,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of student, teacher, weight and bias; [0] where none is wanted."""
    sweep = _Sweep(
        student, teacher, weight, bias, labels, row_weights, options, state, in_place
    )  # fmt: skip
    factor = d_loss * sweep.common
    device, width = student.device, student.shape[1]
    shared = wanted.weight or wanted.bias
    student_half = wanted.student or shared
    teacher_half = labels is not None and (wanted.teacher or shared)

    d_weight = torch.empty_like(weight) if wanted.weight else student.new_empty(0)
    d_bias = torch.empty_like(bias) if wanted.bias and bias is not None else student.new_empty(0)
    d_pairs = [torch.zeros(len(pair), width, device=device) for pair in sweep.pairs]
    weight_sum = torch.empty(sweep.head.piece if wanted.weight else 0, width, device=device)
    bias_sum = torch.empty(sweep.head.piece if wanted.bias else 0, device=device)
    for columns, part, number, slopes in sweep.run(Stage.SLOPES, student_half, teacher_half):
        count = len(slopes) // 2
        rows = slice(0 if student_half else count, 2 * count if teacher_half else count)
        hidden, active = sweep.pairs[number][rows], slopes[rows]
        if wanted.student or wanted.teacher:
            add_product(d_pairs[number][rows], active, part)
        last = number == len(sweep.pairs) - 1
        if wanted.weight:
            total = weight_sum[: len(part)]
            total = total.zero_() if number == 0 else total
            add_product(total, active.t(), hidden)
            if last:
                d_weight[columns] = total * factor
        if wanted.bias:
            column_sum = active.sum(dim=0, dtype=torch.float32)
            column_sum += bias_sum[: len(part)] if number else 0.0
            bias_sum[: len(part)] = column_sum
            if last:
                d_bias[columns] = column_sum * factor
    if not sweep.pairs:
        d_weight.zero_()
        d_bias.zero_()

    def hidden_gradient(like: Tensor, need: bool, teacher_side: bool) -> Tensor:
        if not need:
            return like.new_empty(0)
        gradient = torch.empty_like(like)
        for block, d_pair in zip(sweep.blocks, d_pairs, strict=True):
            count = block.stop - block.start
            gradient[block] = (d_pair[count:] if teacher_side else d_pair[:count]) * factor
        return gradient

    return (
        hidden_gradient(student, wanted.student, False),
        hidden_gradient(teacher, wanted.teacher, True),
        d_weight,
        d_bias,
    )
