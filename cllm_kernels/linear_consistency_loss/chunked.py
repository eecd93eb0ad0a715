"""linear_consistency_loss by chunks of tokens: the vendor's matmuls, gradients beside the losses.

A chunk's student and teacher rows stand behind each other, so that one matmul makes the logits of
both and one each takes d(logits) to the hidden states and to the weight. Logits exist for one chunk
at a time; between them works a pass over the logits in place, which is all that a backend brings.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from cllm_kernels.linear_consistency_loss.chunk import Chunk, Pass
from cllm_kernels.linear_consistency_loss.head import Head, add_product
from cllm_kernels.linear_consistency_loss.options import Gradients, LossOptions, Results, scales

_CPU_BUDGET = 64 << 20  # bytes of logits: half as much costs a tenth in time, twice gains little
_LONGEST = {"cpu": 512, "cuda": 2048}  # tokens: from here on matmuls gain nothing


def losses(
    student: Tensor,  # [M, H]
    teacher: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor | None,  # [M]
    row_weights: Tensor | None,  # [M]
    options: LossOptions,
    wanted: Gradients,
    in_place: Pass,
) -> Results:
    """The losses and the gradients that are wanted, chunk by chunk of tokens."""
    rows, width = student.shape
    device, vocabulary = student.device, weight.shape[0]
    normalisers, both, common = scales(labels, row_weights, student, options)
    weights = student.new_ones(rows, dtype=torch.float32) if row_weights is None else row_weights
    weights = weights.float().contiguous()
    labels = None if labels is None else labels.contiguous()
    consistency = torch.empty(rows, dtype=torch.float32, device=device)
    cross_entropy = torch.empty(rows, dtype=torch.float32, device=device)

    # d(logits) of the student's half is needed for its own gradient and for the weight's; that of
    # the teacher's half only with labels.
    shared = wanted.weight or wanted.bias
    student_half = wanted.student or shared
    teacher_half = labels is not None and (wanted.teacher or shared)

    head = Head(weight, bias)
    size = options.chunk_tokens or automatic_chunk(rows, vocabulary, head.dtype, device)
    size = min(size, max(rows, 1))
    logits = torch.empty(2 * size, vocabulary, dtype=head.dtype, device=device)
    operands = torch.empty(2 * size, width, dtype=head.dtype, device=device)
    gradients = _Accumulator(student, teacher, weight, bias, wanted)
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        count = end - begin
        pair, scores = operands[: 2 * count], logits[: 2 * count]
        pair[:count].copy_(student[begin:end])
        pair[count:].copy_(teacher[begin:end])
        head.logits(pair, scores)
        chunk = Chunk(
            scores[:count],
            scores[count:],
            weights[begin:end],
            None if labels is None else labels[begin:end],
            both,
            consistency[begin:end],
            cross_entropy[begin:end],
            student_half,
            teacher_half,
        )
        in_place(chunk, options)
        first = 0 if student_half else count
        last = 2 * count if teacher_half else count
        if first < last:
            gradients.add(head, scores[first:last], pair[first:last], begin, count, first == 0)
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

    def __init__(
        self,
        student: Tensor,  # [M, H]
        teacher: Tensor,  # [M, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        wanted: Gradients,
    ):
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
        slopes: Tensor,  # [R, V] d(logits): the student's rows, the teacher's, or both
        hidden: Tensor,  # [R, H], the rows that the slopes belong to
        begin: int,
        count: int,
        has_student: bool,
    ) -> None:
        to_hidden = (self.wanted.student and has_student) or (
            self.wanted.teacher and (len(slopes) > count or not has_student)
        )
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
        if has_student and self.wanted.student:
            self.student[begin : begin + count].copy_(d_hidden[:count])
        teacher_rows = d_hidden[count:] if has_student else d_hidden
        if self.wanted.teacher and len(teacher_rows):
            self.teacher[begin : begin + count].copy_(teacher_rows)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.empty:  # no rows
            self.weight.zero_()
        return self.student, self.teacher, self.weight, self.bias
