"""What the drivers hand to a backend's in-place pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

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


@dataclass
class Chunk:
    """Logits of C tokens, of both sides, and what their pass reads and writes.

    With a gradient wanted, WHOLE and SLOPES replace the logits by the loss's derivative with
    respect to them.
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
