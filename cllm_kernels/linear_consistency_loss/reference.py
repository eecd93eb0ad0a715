"""linear_consistency_loss in plain PyTorch: the definition that every other backend is tested
against. Logits are whole here.

`consistency_loss` is the loss alone, differentiable by autograd; `linear_consistency_loss` writes
its derivative out, because an op's implementation runs below autograd. Tests hold them together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllm_kernels.linear_consistency_loss.options import Gradients, LossOptions, Results, scales


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


def consistency_loss(
    student: Tensor,  # [M, H]
    teacher: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor | None,  # [M]
    row_weights: Tensor | None,  # [M]
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, consistency, ar), each [], differentiable by autograd; in fp32, or fp64 for fp64."""
    student_logits = head(student, weight, bias, options.softcap)
    teacher_logits = head(teacher, weight, bias, options.softcap)
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


def linear_consistency_loss(
    student: Tensor,  # [M, H]
    teacher: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor | None,  # [M]
    row_weights: Tensor | None,  # [M]
    options: LossOptions,
    wanted: Gradients,
) -> Results:
    """The losses and the gradients that are wanted, written out."""
    losses = consistency_loss(student, teacher, weight, bias, labels, row_weights, options)
    _, (student_scale, teacher_scale), common = scales(labels, row_weights, student, options)
    unwanted = [student.new_empty(0) for _ in wanted]
    separate = (losses[0], losses[1].clone(), losses[2].clone())
    # An op's results may not share memory, and without labels the loss is the consistency term.
    results = Results._make((*separate, *unwanted, common))
    if not any(wanted):
        return results
    student_logits = head(student, weight, bias, options.softcap)
    teacher_logits = head(teacher, weight, bias, options.softcap)
    temperature = options.temperature
    d_student = student_slopes(
        student_logits / temperature, teacher_logits / temperature, options.divergence, options.beta
    )
    if row_weights is not None:
        weights = row_weights.to(d_student)[:, None]
        d_student = torch.where(weights != 0, weights * d_student, 0.0)
    d_student = d_student * (student_scale.to(d_student) / temperature)
    d_teacher = torch.zeros_like(d_student)
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
    both = torch.cat([d_student, d_teacher])  # [2M, V]
    return results._replace(
        student=(d_student @ wide).to(student.dtype) if wanted.student else results.student,
        teacher=(d_teacher @ wide).to(teacher.dtype) if wanted.teacher else results.teacher,
        weight=both.T @ torch.cat([student, teacher]).to(both) if wanted.weight else results.weight,
        bias=both.sum(dim=0) if wanted.bias else results.bias,
    )
