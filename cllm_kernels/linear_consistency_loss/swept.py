"""linear_consistency_loss by sweeps over the vocabulary, which recompute instead of keeping.

Between the losses and their gradients only ten numbers a token are kept. Logits exist for a piece
of the vocabulary at a time, and a piece's rows of the weight's gradient are complete when the piece
is done: nothing of the weight's size is held in fp32, and nothing as long as a row of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cllm_kernels.linear_consistency_loss.chunk import (
    Chunk,
    Pass,
    Stage,
    blocks,
    most_pairs,
    padded_weights,
)
from cllm_kernels.linear_consistency_loss.chunked import automatic_chunk
from cllm_kernels.linear_consistency_loss.head import Heads, add_product
from cllm_kernels.linear_consistency_loss.options import (
    STATE_FIELDS,
    Gradients,
    LossOptions,
    Operands,
    Results,
    scales,
)

_PIECE = {"cpu": 4096, "cuda": 8192}  # rows of the weight in a piece
_LONGEST = {"cpu": 512, "cuda": 8192}  # tokens in a block


class _Sweep:
    """The operands of a call, cut into blocks of tokens and pieces of the vocabulary."""

    def __init__(
        self,
        operands: Operands,
        options: LossOptions,
        state: Tensor,  # [M, STATE_FIELDS]
        in_place: Pass,
    ):
        self.options, self.state, self.in_place = options, state, in_place
        student, teacher = operands.student, operands.teacher
        students, teachers, device = len(student), len(teacher), student.device
        self.vocabulary = operands.weight.shape[0]
        self.row_weights = padded_weights(operands.row_weights, student, teachers)
        self.labels = None if operands.labels is None else operands.labels.contiguous()
        self.normalisers, self.scales, self.common = scales(operands, options)
        self.losses = torch.empty(2, teachers, dtype=torch.float32, device=device)
        self.heads = Heads(operands, _PIECE.get(device.type))
        self.piece, dtype = self.heads.own.piece, self.heads.own.dtype
        size = options.chunk_tokens or automatic_chunk(
            most_pairs(students, teachers), self.piece, dtype, device, _LONGEST
        )
        self.blocks = blocks(students, teachers, size)
        # What our head multiplies, student and teacher of a block behind each other, so that one
        # matmul makes the logits of both; and what the teachers' own head does, if they have one.
        self.hidden: list[Tensor] = []  # [height, H], or [C, H]
        self.others: list[Tensor] = []  # [0, H], or [C, H2]
        shared = self.heads.other is None
        for block in self.blocks:
            halves = [student[block.rows]] if block.paired else []
            halves += [teacher[block.rows]] if shared else []
            self.hidden.append(torch.cat(halves).to(dtype))
            self.others.append(teacher[:0] if shared else teacher[block.rows].to(dtype))
        highest = max((block.height for block in self.blocks), default=0)
        self.buffer = torch.empty(highest * self.piece, dtype=dtype, device=device)

    def run(
        self, numbers: list[int], stage: Stage, student: bool = False, teacher: bool = False
    ) -> Iterator[tuple[slice, Tensor, int, Tensor]]:
        """Passes over all pieces and the blocks of these numbers, with these sides' gradients;
        after each: (columns, that part of our weight, the block's number, logits or slopes)."""
        for columns, part, other_part in self.heads.pieces():
            for number in numbers:
                height = self.blocks[number].height
                scores = self.buffer[: height * len(part)].view(height, len(part))
                hidden, others = self.hidden[number], self.others[number]
                self.heads.multiply(hidden, others, columns, part, other_part, scores)
                self._pass(number, scores, columns.start, stage, student, teacher)
                yield columns, part, number, scores

    def finish(self) -> None:
        """The losses, from the state alone."""
        for number, block in enumerate(self.blocks):
            nothing = self.buffer[:0].view(block.height, 0)
            self._pass(number, nothing, 0, Stage.SLOPES, False, False)

    def _pass(
        self,
        number: int,
        scores: Tensor,  # [height, W]
        first: int,
        stage: Stage,
        student: bool,
        teacher: bool,
    ) -> None:
        block = self.blocks[number]
        rows = block.rows
        chunk = Chunk(
            scores[: block.count],
            scores[block.height - block.count :],
            self.row_weights[rows],
            None if self.labels is None else self.labels[rows],
            self.scales,
            self.losses[0, rows],
            self.losses[1, rows],
            student and block.paired,
            teacher,
            stage,
            self.state[rows],
            first,
            self.vocabulary,
        )
        self.in_place(chunk, self.options)


def losses(operands: Operands, options: LossOptions, in_place: Pass) -> Results:
    """The losses alone, and the state for `gradients`."""
    student, rows = operands.student, len(operands.teacher)
    state = torch.zeros(rows, STATE_FIELDS, dtype=torch.float64, device=student.device)
    state[:, [0, 2]] = -float("inf")  # the largest logits so far
    sweep = _Sweep(operands, options, state, in_place)
    everything = list(range(len(sweep.blocks)))
    pairs = [number for number in everything if sweep.blocks[number].paired]
    for _ in sweep.run(everything, Stage.SUMS):
        pass
    if options.divergence == "jsd":
        for _ in sweep.run(pairs, Stage.DIVERGENCE):
            pass
    sweep.finish()
    consistency = sweep.losses[0].sum() * sweep.normalisers[0]
    ar = sweep.losses[1].sum() * sweep.normalisers[1]
    unwanted = [student.new_empty(0) for _ in Gradients._fields]
    loss = consistency + options.ar_weight * ar
    return Results._make((loss, consistency, ar, *unwanted, sweep.common, state))


def gradients(
    operands: Operands,
    options: LossOptions,
    wanted: Gradients,
    state: Tensor,  # [M, STATE_FIELDS], of `losses`
    d_loss: Tensor,  # []
    in_place: Pass,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of student, teacher, weight and bias; [0] where none is wanted."""
    student, teacher, weight, bias = operands[:4]
    sweep = _Sweep(operands, options, state, in_place)
    factor = d_loss * sweep.common
    device, width = student.device, student.shape[1]
    shared = wanted.weight or wanted.bias
    student_half = wanted.student or shared
    teacher_half = operands.labels is not None and (wanted.teacher or shared)

    d_weight = torch.empty_like(weight) if wanted.weight else student.new_empty(0)
    d_bias = torch.empty_like(bias) if wanted.bias and bias is not None else student.new_empty(0)
    kind: dict[str, Any] = dict(dtype=torch.float32, device=device)
    d_hidden = [torch.zeros(len(hidden), width, **kind) for hidden in sweep.hidden]
    weight_sum = torch.empty(sweep.piece if wanted.weight else 0, width, **kind)
    bias_sum = torch.empty(sweep.piece if wanted.bias else 0, **kind)
    active = [block.active(student_half, teacher_half) for block in sweep.blocks]
    numbers = [n for n, rows in enumerate(active) if rows.start < rows.stop]
    for columns, part, number, scores in sweep.run(
        numbers, Stage.SLOPES, student_half, teacher_half
    ):
        rows = active[number]
        hidden, slopes = sweep.hidden[number][rows], scores[rows]
        begins, ends = number == numbers[0], number == numbers[-1]
        if wanted.student or wanted.teacher:
            add_product(d_hidden[number][rows], slopes, part)
        if wanted.weight:
            total = weight_sum[: len(part)]
            total = total.zero_() if begins else total
            add_product(total, slopes.t(), hidden)
            if ends:
                d_weight[columns] = total * factor
        if wanted.bias:
            column_sum = slopes.sum(dim=0, dtype=torch.float32)
            column_sum += 0.0 if begins else bias_sum[: len(part)]
            bias_sum[: len(part)] = column_sum
            if ends:
                d_bias[columns] = column_sum * factor
    if not numbers:
        d_weight.zero_()
        d_bias.zero_()

    def hidden_gradient(like: Tensor, need: bool, teacher_side: bool) -> Tensor:
        if not need:
            return like.new_empty(0)
        gradient = torch.empty_like(like)
        for block, both in zip(sweep.blocks, d_hidden, strict=True):
            split = block.height - block.count
            if teacher_side:
                gradient[block.rows] = both[split:] * factor
            elif block.paired:
                gradient[block.rows] = both[:split] * factor
        return gradient

    return (
        hidden_gradient(student, wanted.student, False),
        hidden_gradient(teacher, wanted.teacher, True),
        d_weight,
        d_bias,
    )
