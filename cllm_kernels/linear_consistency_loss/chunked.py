"""linear_consistency_loss by chunks of tokens: the vendor's matmuls, gradients beside the losses.

A chunk's student and teacher rows stand behind each other, so that one matmul makes the logits of
both and one each takes d(logits) to the hidden states and to the weight. Logits exist for one chunk
at a time; between them works a pass over the logits in place, which is all that a backend brings.
Teachers without a student have chunks of their own.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from cllm_kernels.linear_consistency_loss.chunk import (
    Chunk,
    Pass,
    blocks,
    most_pairs,
    padded_weights,
)
from cllm_kernels.linear_consistency_loss.head import Head, Heads, add_product
from cllm_kernels.linear_consistency_loss.options import (
    Gradients,
    LossOptions,
    Operands,
    Results,
    scales,
)

_CPU_BUDGET = 64 << 20  # bytes of logits: half as much costs a tenth in time, twice gains little
_LONGEST = {"cpu": 512, "cuda": 2048}  # tokens: from here on matmuls gain nothing


def losses(operands: Operands, options: LossOptions, wanted: Gradients, in_place: Pass) -> Results:
    """The losses and the gradients that are wanted, chunk by chunk of tokens."""
    student, teacher, weight = operands.student, operands.teacher, operands.weight
    (students, width), teachers = student.shape, len(teacher)
    device, vocabulary = student.device, weight.shape[0]
    normalisers, both, common = scales(operands, options)
    weights = padded_weights(operands.row_weights, student, teachers)
    labels = None if operands.labels is None else operands.labels.contiguous()
    consistency = torch.empty(teachers, dtype=torch.float32, device=device)
    cross_entropy = torch.empty(teachers, dtype=torch.float32, device=device)

    # d(logits) of the student's half is needed for its own gradient and for the weight's; that of
    # the teacher's half only with labels.
    shared = wanted.weight or wanted.bias
    student_half = wanted.student or shared
    teacher_half = labels is not None and (wanted.teacher or shared)

    heads = Heads(operands)
    dtype, most = heads.own.dtype, most_pairs(students, teachers)
    size = options.chunk_tokens or automatic_chunk(most, vocabulary, dtype, device)
    cut = blocks(students, teachers, size)
    highest = max((block.height for block in cut), default=0)
    logits = torch.empty(highest, vocabulary, dtype=dtype, device=device)
    hidden = torch.empty(highest, width, dtype=dtype, device=device)
    gradients = _Accumulator(operands, wanted)
    for block in cut:
        rows, count, split = block.rows, block.count, block.height - block.count
        scores = logits[: block.height]
        if block.paired:
            hidden[:count].copy_(student[rows])
        if heads.other is None:
            own, others = hidden[: block.height], teacher[:0]
            own[split:].copy_(teacher[rows])
        else:
            own, others = hidden[:split], teacher[rows].to(dtype)
        heads.logits(own, others, scores)
        chunk = Chunk(
            scores[:count],
            scores[split:],
            weights[rows],
            None if labels is None else labels[rows],
            both,
            consistency[rows],
            cross_entropy[rows],
            student_half and block.paired,
            teacher_half,
        )
        in_place(chunk, options)
        active = block.active(student_half, teacher_half)
        if active.start < active.stop:
            gradients.add(
                heads.own,
                scores[active],
                own[active],
                rows if block.paired and student_half else None,
                rows if teacher_half else None,
            )
    # An op's results may not share memory: each is computed into its own.
    mean_consistency = consistency.sum() * normalisers[0]
    ar = cross_entropy.sum() * normalisers[1]
    loss = mean_consistency + options.ar_weight * ar
    unneeded = student.new_empty(0, dtype=torch.float64)
    return Results(loss, mean_consistency, ar, *gradients.tensors(), common, unneeded)


def automatic_chunk(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    longest: dict[str, int] | None = None,
) -> int:
    """Tokens a chunk: a power of two whose logits take at most an eighth of the free memory.

    Fixed by token count, not by hidden size: chunks of a few tokens starve the matmuls.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = (free + held) // 8
    else:
        budget = min(_CPU_BUDGET, _free_memory() // 8)
    fits = budget // (2 * columns * dtype.itemsize)
    most = (longest or _LONGEST).get(device.type, 512)
    fits = max(1, min(fits, most, 1 << max(rows - 1, 0).bit_length()))
    return 1 << (fits.bit_length() - 1)


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS has no such count
        return 8 * _CPU_BUDGET


class _Accumulator:
    """The gradients of all chunks: hidden states' written, weight's and bias's summed in fp32."""

    def __init__(self, operands: Operands, wanted: Gradients):
        student, teacher, weight, bias = operands[:4]
        self.wanted = wanted

        def room(like: Tensor | None, need: bool, dtype: torch.dtype) -> Tensor:
            if like is None or not need:
                return student.new_empty(0)
            return torch.empty(like.shape, dtype=dtype, device=like.device)

        self.student = room(student, wanted.student, student.dtype).zero_()
        self.teacher = room(teacher, wanted.teacher, teacher.dtype).zero_()
        self.weight = room(weight, wanted.weight, torch.float32)
        self.bias = room(bias, wanted.bias, torch.float32).zero_()
        self.empty = True  # nothing has been added yet

    def add(
        self,
        head: Head,
        slopes: Tensor,  # [R, V] d(logits): the students' rows, the teachers', or both
        hidden: Tensor,  # [R, H], the rows that the slopes belong to
        students: slice | None,  # where the students' rows come from; None: there are none
        teachers: slice | None,  # where the teachers' rows come from
    ) -> None:
        to_student = self.wanted.student and students is not None
        to_teacher = self.wanted.teacher and teachers is not None
        to_hidden = to_student or to_teacher
        if self.wanted.bias:
            self.bias += slopes.sum(dim=0, dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        if to_hidden or self.wanted.weight:
            for columns, part in head.largest_pieces():
                piece = slopes[:, columns]
                if d_hidden is not None:
                    if columns.start == 0:
                        torch.mm(piece, part, out=d_hidden)
                    else:
                        d_hidden.addmm_(piece, part)
                if self.wanted.weight:
                    add_product(self.weight[columns], piece.t(), hidden, first=self.empty)
        self.empty = False
        if d_hidden is None:
            return
        split = 0 if students is None else students.stop - students.start
        if to_student:
            self.student[students].copy_(d_hidden[:split])
        if to_teacher:
            self.teacher[teachers].copy_(d_hidden[split:])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.empty:  # no rows
            self.weight.zero_()
        return self.student, self.teacher, self.weight, self.bias
