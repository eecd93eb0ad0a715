"""What a user would take instead of linear_consistency_loss: written out, chunked, Liger-Kernel.

Every function returns (loss, gradients of: student, weight and, with labels, teacher). Rows weigh
the same, the temperature is 1; "forward_kl" and "jsd" (beta 0.5) are what all sides can compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.cases import Inputs, Run, compiled
from benchmarks.kernels.ceilings import SLOW, Timer

LN2 = 0.6931471805599453


@dataclass(frozen=True)
class Loss:
    """Which loss a case computes."""

    divergence: str = "forward_kl"
    labelled: bool = False
    label_smoothing: float = 0.0
    ar_weight: float = 1.0


def leaves(inputs: Inputs, loss: Loss) -> tuple[Tensor, ...]:
    names = ("student", "weight", "teacher") if loss.labelled else ("student", "weight")
    return tuple(inputs[name] for name in names)


def written_out(
    student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor | None, loss: Loss
) -> Tensor:
    """The formula on full logits, as a training loop would have it."""
    clean = teacher if loss.labelled else teacher.detach()
    frozen = weight if loss.labelled else weight.detach()
    clean_logits = (clean @ frozen.t()).float()  # [M, V]
    q = F.log_softmax((student @ weight.t()).float(), dim=-1)
    p = F.log_softmax(clean_logits.detach(), dim=-1)
    if loss.divergence == "forward_kl":
        consistency = F.kl_div(q, p, log_target=True, reduction="batchmean")
    else:
        mixture = torch.logaddexp(p, q) - LN2
        consistency = 0.5 * (
            F.kl_div(mixture, p, log_target=True, reduction="batchmean")
            + F.kl_div(mixture, q, log_target=True, reduction="batchmean")
        )
    if not loss.labelled:
        return consistency
    ar = F.cross_entropy(clean_logits, labels, label_smoothing=loss.label_smoothing)
    return consistency + loss.ar_weight * ar


def with_gradients(function: Callable[..., Tensor], loss: Loss) -> Callable[[Inputs], Run]:
    """Forward and backward of a differentiable formula of (student, teacher, weight, labels)."""

    def build(inputs: Inputs) -> Run:
        wanted = leaves(inputs, loss)
        operands = tuple(inputs[name] for name in ("student", "teacher", "weight", "labels"))

        def call() -> tuple[Tensor, ...]:
            value = function(*operands)
            return (value.detach(), *torch.autograd.grad(value, wanted))

        return Run(call)

    return build


def chunk_step(
    student: Tensor,  # [c, H]
    teacher: Tensor,  # [c, H]
    weight: Tensor,  # [V, H]
    labels: Tensor | None,  # [c]
    scale: float,
    ar_scale: float,
    loss: Loss,
) -> tuple[Tensor, ...]:
    """A chunk's loss, d(student) and d(logits), by the gradient's own formula: no graph is kept."""
    q = F.log_softmax((student @ weight.t()).float(), dim=-1)  # [c, V]
    clean = (teacher @ weight.t()).float()
    p = F.log_softmax(clean, dim=-1)
    if loss.divergence == "forward_kl":
        value = scale * (p.exp() * (p - q)).sum()
        gradient = scale * (q.exp() - p.exp())
    else:
        mixture = torch.logaddexp(p, q) - LN2
        towards = 0.5 * (q - mixture)
        value = scale * (0.5 * p.exp() * (p - mixture) + q.exp() * towards).sum()
        gradient = scale * q.exp() * (towards - (q.exp() * towards).sum(dim=-1, keepdim=True))
    gradient = gradient.to(weight.dtype)
    if labels is None:
        return value, gradient @ weight, gradient
    smoothing, vocabulary = loss.label_smoothing, weight.shape[0]
    hit = torch.arange(vocabulary, device=labels.device) == labels[:, None]
    target = hit * (1 - smoothing) + smoothing / vocabulary
    value = value - ar_scale * (target * p).sum()
    clean_gradient = (ar_scale * (p.exp() - target)).to(weight.dtype)
    return value, gradient @ weight, gradient, clean_gradient @ weight, clean_gradient


def chunked(
    loss: Loss, sizes: tuple[int, ...], *, widened: bool = False
) -> Callable[[Inputs], Run]:
    """The compiled chunked formula at the fastest of these chunk sizes: full logits never exist.

    One compiled function per chunk, as in pytorch#124480, with the gradient written by hand, so
    that the compiler fuses logits to loss and gradient in one graph; dW is accumulated in place by
    the matmul itself, in the weight's dtype. `widened`: everything in fp32, for CPUs on which
    torch's 16-bit matmul is slower than a conversion and an fp32 one.
    """

    def build(inputs: Inputs) -> Run:
        step = compiled(chunk_step)
        timer = Timer(inputs["weight"].device)
        calls, seconds = {}, {}
        for size in sizes:
            calls[size] = chunked_call(inputs, loss, step, size, widened)
            calls[size]()
            seconds[size] = timer.start(Run(calls[size]))()
            if seconds[size] > SLOW:
                break
        best = min(seconds, key=seconds.__getitem__)
        return Run(calls[best], notes={"chunk_tokens": best})

    return build


def chunked_call(
    inputs: Inputs, loss: Loss, step: Callable[..., tuple[Tensor, ...]], size: int, widened: bool
) -> Callable[[], tuple[Tensor, ...]]:
    student, teacher, given = (inputs[name].detach() for name in ("student", "teacher", "weight"))
    labels = inputs["labels"] if loss.labelled else None
    rows = student.shape[0]

    def widen(tensor: Tensor) -> Tensor:
        return tensor.float() if widened else tensor

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        weight = widen(given)
        d_weight = torch.zeros_like(weight)
        d_student = torch.empty_like(student)
        d_teacher = torch.empty_like(teacher) if loss.labelled else None
        total = torch.zeros((), device=student.device)
        for begin in range(0, rows, size):
            part = slice(begin, min(begin + size, rows))
            ours, clean = widen(student[part]), widen(teacher[part])
            chosen = None if labels is None else labels[part]
            value, d_ours, gradient, *clean_side = step(
                ours, clean, weight, chosen, 1 / rows, loss.ar_weight / rows, loss
            )
            total += value
            d_student[part] = d_ours
            d_weight.addmm_(gradient.t(), ours)
            if clean_side:
                d_teacher[part] = clean_side[0]
                d_weight.addmm_(clean_side[1].t(), clean)
        gradients = (d_student, d_weight.to(given.dtype))
        return (total, *gradients, d_teacher) if loss.labelled else (total, *gradients)

    return call


def liger_missing(device: torch.device, loss: Loss) -> str | None:
    """Why Liger-Kernel cannot be measured on this case, or None."""
    if find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if device.type != "cuda":
        return "Liger-Kernel's fused losses are Triton kernels for GPUs"
    if loss.labelled:
        return "Liger-Kernel's labels are the student's, not those of the clean rows"
    return None


def liger_jsd(loss: Loss) -> Callable[[Inputs], Run]:
    """Liger-Kernel's fused linear JSD (Triton); beta 0 is its forward KL."""

    def build(inputs: Inputs) -> Run:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        module = LigerFusedLinearJSD(jsd_beta=0.0 if loss.divergence == "forward_kl" else 0.5)
        frozen = inputs["weight"].detach()

        def formula(student: Tensor, teacher: Tensor, weight: Tensor, _: Tensor) -> Tensor:
            return module(student, weight, teacher.detach(), frozen, None)

        return with_gradients(formula, loss)(inputs)

    return build


def liger_distillation(loss: Loss) -> Callable[[Inputs], Run]:
    """Liger-Kernel's chunked distillation loss (torch.compile over chunks), soft loss alone."""

    def build(inputs: Inputs) -> Run:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=0.0 if loss.divergence == "forward_kl" else 0.5,
        )
        frozen = inputs["weight"].detach()

        def formula(student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            value = module(
                student_input=student,
                student_weight=weight,
                teacher_input=teacher.detach(),
                teacher_weight=frozen,
                true_labels=labels,
                student_bias=None,
                teacher_bias=None,
            )
            return value[0] if isinstance(value, tuple) else value

        return with_gradients(formula, loss)(inputs)

    return build
