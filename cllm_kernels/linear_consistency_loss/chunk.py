"""What the drivers hand to a backend's in-place pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from cllm_kernels.linear_consistency_loss.options import LossOptions


class Stage(IntEnum):
    """What a pass does; the numbers are those of csrc/ops.h.

    WHOLE does all of it for whole rows. The others do the same for rows that come in pieces of the
    vocabulary: SUMS for every piece, then DIVERGENCE for every piece (jsd only), then SLOPES, which
    also writes the losses.
    """

    WHOLE = 0
    SUMS = 1
    DIVERGENCE = 2
    SLOPES = 3


@dataclass(frozen=True)
class Block:
    """Neighbouring teacher rows whose logits exist together, and the student rows beside them.

    Blocks end where the students do: either every teacher of a block has its student, or none.
    """

    begin: int
    end: int
    paired: bool

    @property
    def count(self) -> int:
        """Teacher rows."""
        return self.end - self.begin

    @property
    def height(self) -> int:
        """Rows of logits: the students', if there are any, and behind them the teachers'."""
        return 2 * self.count if self.paired else self.count

    @property
    def rows(self) -> slice:
        return slice(self.begin, self.end)

    def active(self, student: bool, teacher: bool) -> slice:
        """The rows of logits of the chosen sides."""
        split = self.height - self.count
        return slice(0 if student else split, self.height if teacher else split)


def blocks(students: int, teachers: int, size: int) -> list[Block]:
    """Blocks of at most `size` pairs, then of teachers alone: as many logits, twice the rows."""
    paired = [Block(b, min(b + size, students), True) for b in range(0, students, size)]
    alone = range(students, teachers, 2 * size)
    return paired + [Block(b, min(b + 2 * size, teachers), False) for b in alone]


def most_pairs(students: int, teachers: int) -> int:
    """The pairs of a block that would hold all rows of the longer kind."""
    return max(students, (teachers - students + 1) // 2)


def padded_weights(row_weights: Tensor | None, student: Tensor, teachers: int) -> Tensor:
    """[M] float32: the row weights, and 0 for teachers without a student."""
    weights = student.new_zeros(teachers, dtype=torch.float32)
    weights[: len(student)] = 1.0 if row_weights is None else row_weights
    return weights


@dataclass
class Chunk:
    """Logits of C tokens, of both sides, and what their pass reads and writes.

    With a gradient wanted, WHOLE and SLOPES replace the logits by the loss's derivative with
    respect to them.

    Teachers without a student stand on both sides, in the same memory: weights of 0 and no gradient
    asked of the student's side make their copy count for nothing, and nothing writes it.
    """

    student: Tensor  # [C, W] logits, mutated; W = V, or the width of a piece
    teacher: Tensor  # [C, W] logits, mutated
    row_weights: Tensor  # [C] float32
    labels: Tensor | None  # [C] int64, negative where there is none
    scales: Tensor  # [2] float32, for d(student) and d(teacher)
    consistency: Tensor  # [C] float32, written by WHOLE and SLOPES
    cross_entropy: Tensor  # [C] float32, written by WHOLE and SLOPES
    student_gradient: bool
    teacher_gradient: bool
    stage: Stage = Stage.WHOLE
    state: Tensor | None = None  # [C, STATE_FIELDS] float64, mutated by SUMS and DIVERGENCE
    first: int = 0  # index of the logits' first column in the vocabulary
    vocabulary: int = 0  # columns of whole rows; 0: those of the logits


Pass = Callable[[Chunk, LossOptions], None]
