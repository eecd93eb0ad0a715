"""linear_consistency_loss in plain PyTorch: the definition that every other backend is tested
against. Logits are whole here.

`consistency_loss` is the loss alone, differentiable by autograd; `losses` writes its derivative
out, because an op's implementation runs below autograd. Tests hold them together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllm_kernels.linear_consistency_loss.options import (
    STATE_FIELDS,
    Gradients,
    Implementation,
    LossOptions,
    Operands,
    Results,
    scales,
)


def divergence_rows(
    student_logits: Tensor,  # [M, V]
    teacher_logits: Tensor,  # [M, V]
    divergence: str,
    beta: float,
) -> Tensor:
    """[M]: how far the student's distribution q lies from the teacher's p, row by row.

    forward_kl: KL(p || q); reverse_kl: KL(q || p);
    jsd: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    """
    log_q = torch.log_softmax(student_logits, dim=-1)
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        return _expectation(p, log_p, log_q)
    if divergence == "reverse_kl":
        return _expectation(q, log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _expectation(p, log_p, log_m) + (1 - beta) * _expectation(q, log_q, log_m)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))


def _expectation(weights: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum over v of weights * (log_a - log_b); where the weight is 0 so is the term."""
    possible = weights > 0
    gap = torch.where(possible, log_a, 0.0) - torch.where(possible, log_b, 0.0)
    return (weights * gap).sum(dim=-1)


def head(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    softcap: float | None,
) -> Tensor:
    """Logits [M, V], in fp32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _both_logits(operands: Operands, options: LossOptions) -> tuple[Tensor, Tensor]:
    """The students' [S, V] and the teachers' [M, V]."""
    student_logits = head(operands.student, operands.weight, operands.bias, options.softcap)
    if operands.teacher_weight is None:
        other = (operands.weight, operands.bias)
    else:
        other = (operands.teacher_weight.detach(), operands.teacher_bias)
    return student_logits, head(operands.teacher, *other, options.softcap)


def consistency_loss(operands: Operands, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, consistency, ar), each [], differentiable by autograd; in fp32, or fp64 for fp64."""
    student, labels, row_weights = operands.student, operands.labels, operands.row_weights
    student_logits, teacher_logits = _both_logits(operands, options)
    zero = student_logits.new_zeros(())
    weights = student_logits.new_ones(len(student))
    if row_weights is not None:
        weights = row_weights.to(weights)
    counted = weights.nonzero()[:, 0]
    rows = divergence_rows(
        student_logits[counted] / options.temperature,
        teacher_logits[counted].detach() / options.temperature,
        options.divergence,
        options.beta,
    )
    consistency = (weights[counted] * rows).sum() / weights.sum() if len(counted) else zero
    ar = zero
    if labels is not None:
        labelled = (labels >= 0).nonzero()[:, 0]
        if len(labelled):
            ar = torch.nn.functional.cross_entropy(
                teacher_logits[labelled],
                labels[labelled],
                label_smoothing=options.label_smoothing,
            )
    return consistency + options.ar_weight * ar, consistency, ar


def student_slopes(
    student_logits: Tensor,  # [M, V], at the temperature
    teacher_logits: Tensor,  # [M, V], at the temperature
    divergence: str,
    beta: float,
) -> Tensor:
    """[M, V]: the derivative of `divergence_rows` with respect to the student's logits."""
    log_q = torch.log_softmax(student_logits, dim=-1)
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    q = log_q.exp()
    if divergence == "forward_kl":
        return q - log_p.exp()
    if divergence == "reverse_kl":
        log_other, share = log_p, 1.0
    else:
        log_other = _log_mixture(log_p, log_q, beta)
        share = 1.0 - beta
    gap = torch.where(q > 0, log_q, 0.0) - torch.where(q > 0, log_other, 0.0)
    return share * q * (gap - (q * gap).sum(dim=-1, keepdim=True))


def losses(operands: Operands, options: LossOptions, wanted: Gradients) -> Results:
    """The losses and the gradients that are wanted, written out."""
    student, teacher, weight = operands.student, operands.teacher, operands.weight
    labels, row_weights, students = operands.labels, operands.row_weights, len(operands.student)
    values = consistency_loss(operands, options)
    _, (student_scale, teacher_scale), common = scales(operands, options)
    unwanted = [student.new_empty(0) for _ in wanted]
    separate = (values[0], values[1].clone(), values[2].clone())
    # An op's results may not share memory, and without labels the loss is the consistency term.
    fields = (len(teacher), STATE_FIELDS) if options.recompute else (0,)
    state = student.new_zeros(fields, dtype=torch.float64)
    results = Results._make((*separate, *unwanted, common, state))
    if options.recompute or not any(wanted):
        return results
    student_logits, teacher_logits = _both_logits(operands, options)
    temperature = options.temperature
    d_student = student_slopes(
        student_logits / temperature,
        teacher_logits[:students] / temperature,
        options.divergence,
        options.beta,
    )
    if row_weights is not None:
        weights = row_weights.to(d_student)[:, None]
        d_student = torch.where(weights != 0, weights * d_student, 0.0)
    d_student = d_student * (student_scale.to(d_student) / temperature)
    d_teacher = torch.zeros_like(teacher_logits)
    if labels is not None:
        target = torch.full_like(d_teacher, options.label_smoothing / weight.shape[0])
        at_label = labels.clamp(min=0)[:, None]
        target.scatter_add_(
            1, at_label, target.new_full((), 1 - options.label_smoothing).expand_as(at_label)
        )
        slopes = (torch.softmax(teacher_logits, dim=-1) - target) * teacher_scale.to(d_student)
        d_teacher = torch.where((labels >= 0)[:, None], slopes, 0.0)
    if options.softcap is not None:  # through the cap: 1 - tanh^2
        d_student = d_student * (1 - (student_logits / options.softcap) ** 2)
        d_teacher = d_teacher * (1 - (teacher_logits / options.softcap) ** 2)
    wide = weight.to(d_student)
    both, hidden = d_student, student  # another model's head gets no gradient
    if operands.teacher_weight is None:
        both, hidden = torch.cat([d_student, d_teacher]), torch.cat([student, teacher])
    return results._replace(
        student=(d_student @ wide).to(student.dtype) if wanted.student else results.student,
        teacher=(d_teacher @ wide).to(teacher.dtype) if wanted.teacher else results.teacher,
        weight=both.T @ hidden.to(both) if wanted.weight else results.weight,
        bias=both.sum(dim=0) if wanted.bias else results.bias,
    )


def gradients(
    operands: Operands,
    options: LossOptions,
    wanted: Gradients,
    state: Tensor,  # [M, STATE_FIELDS], not needed here
    d_loss: Tensor,  # []
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, once more and scaled."""
    student, teacher, weight, bias = operands[:4]
    found = losses(operands, options._replace(recompute=False), wanted)
    factor = d_loss * found.common
    return (
        (found.student * factor).to(student.dtype),
        (found.teacher * factor).to(teacher.dtype),
        (found.weight * factor).to(weight.dtype),
        (found.bias * factor).to(student.dtype if bias is None else bias.dtype),
    )


implementation = Implementation(losses, gradients)
