"""What the backends of linear_consistency_loss share: options, results, normalisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class Operands(NamedTuple):
    """The tensors of a call, checked: S students, M >= S teachers, teacher i < S for student i."""

    student: Tensor  # [S, H]
    teacher: Tensor  # [M, H]; with a head of their own [S, H2]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    teacher_weight: Tensor | None  # [V, H2], or None: the teachers' head is weight too
    teacher_bias: Tensor | None  # [V]
    labels: Tensor | None  # [M]; None with teacher_weight
    row_weights: Tensor | None  # [S]


class LossOptions(NamedTuple):
    """The numbers of a call, checked."""

    divergence: str
    beta: float
    temperature: float
    label_smoothing: float
    ar_weight: float
    softcap: float | None
    chunk_tokens: int  # 0: chosen from free memory
    recompute: bool


class Gradients(NamedTuple):
    """Which gradients a call must deliver."""

    student: bool
    teacher: bool
    weight: bool
    bias: bool


class Results(NamedTuple):
    """The losses of a call, and the gradients that were made beside them.

    Gradients are those of the loss divided by `common`, [0] where none was wanted; fp16 keeps them
    in range this way (see `scales`).
    """

    loss: Tensor  # [] float32 or wider
    consistency: Tensor  # [] float32 or wider
    ar: Tensor  # [] float32 or wider
    student: Tensor  # [S, H] of student's dtype, or [0]
    teacher: Tensor  # [M, H] of student's dtype, or [0]
    weight: Tensor  # [V, H] float32 or wider, or [0]
    bias: Tensor  # [V] float32 or wider, or [0]
    common: Tensor  # [] float32 or wider
    state: Tensor  # [M, STATE_FIELDS] float64 for `gradients` with recompute, else [0]


class Implementation(NamedTuple):
    """A backend: `losses` makes the losses and, unless they are to be recomputed, the gradients;
    `gradients` makes those from the state that `losses` left.

        losses(operands, options, wanted) -> Results
        gradients(operands, options, wanted, state, d_loss)
            -> (d_student, d_teacher, d_weight, d_bias)

    The latter are the operands' own gradients, in their dtypes, for a loss whose gradient is
    d_loss []; [0] where none is wanted.
    """

    losses: Callable[..., Results]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


# What is kept of a row between the sweeps of recomputation: enum StateField in csrc/ops.h.
STATE_FIELDS = 10


def scales(operands: Operands, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(normalisers [2], scales [2], common []), float32 or wider, all on the device.

    The normalisers are 1 / sum of row weights and 1 / number of labels (0 where there are none),
    the scales what d(student logits) and d(teacher logits) are multiplied by, common what is left
    to multiply the gradients by. common is 1 but in fp16, where the mean over thousands of rows
    would push d(logits) below the smallest number: there the gradients are those of the sum.
    """
    student, labels, row_weights = operands.student, operands.labels, operands.row_weights
    wide = torch.promote_types(student.dtype, torch.float32)
    device, rows = student.device, len(student)
    one = torch.ones((), dtype=wide, device=device)
    total = one * rows if row_weights is None else row_weights.sum(dtype=wide)
    count = one * 0 if labels is None else (labels >= 0).sum().to(wide)
    totals = torch.stack([total, count])
    normalisers = torch.where(totals > 0, 1 / totals, 0.0)
    common = one
    if student.dtype is torch.float16:
        common = torch.where(total > 0, normalisers[0], normalisers[1])
        common = torch.where(common > 0, common, one)
    wanted = torch.stack([normalisers[0], normalisers[1] * options.ar_weight])
    return normalisers, wanted / common, common
