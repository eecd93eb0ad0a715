"""linear_consistency_loss: the language-model head and the loss of consistency training in one op,
the logits of a few tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import LIBRARY, eager, without_autocast
from cllm_kernels.linear_consistency_loss.checks import check, check_values
from cllm_kernels.linear_consistency_loss.options import (
    STATE_FIELDS,
    Gradients,
    Implementation,
    LossOptions,
    Operands,
)


def _reference() -> Any:
    from cllm_kernels.linear_consistency_loss import reference

    return reference.implementation


def _cpp() -> Any:
    from cllm_kernels.linear_consistency_loss import native

    return native.cpu


def _cuda() -> Any:
    from cllm_kernels.linear_consistency_loss import native

    return native.cuda


def _triton() -> Any:
    from cllm_kernels.linear_consistency_loss import triton_kernel

    return triton_kernel.implementation


OP = register(
    Op(
        name="linear_consistency_loss",
        implementations={"reference": _reference, "cpp": _cpp, "cuda": _cuda, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
        cuda_function="consistency_chunk_cuda",
    )
)


def linear_consistency_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    ar_weight: float = 1.0,
    row_weights: Tensor | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The consistency loss of a CLLM and its autoregressive loss, from hidden states.

    With logits z(h) = softcap * tanh((h @ weight.T + bias) / softcap), or without the cap, row i's
    teacher p = softmax(z(teacher[i]) / temperature) and student q = softmax(z(student[i]) /
    temperature):

        consistency = sum_i w_i D(p_i, q_i) / sum_i w_i       over i < S, with w = row_weights
        ar          = mean over labelled rows of the cross-entropy of z(teacher[i]) with labels[i]
        loss        = consistency + ar_weight * ar

    D is KL(p || q) ("forward_kl"; Kou et al. 2024, arXiv 2403.00835, eq. 6 and 7), KL(q || p)
    ("reverse_kl"), or beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q
    ("jsd"; Agarwal et al. 2024, arXiv 2306.13649, sec. 2). The teacher's rows are the clean ones,
    which are also those of the autoregressive loss, so their logits are made once; rows from S on
    have no student and take part in the autoregressive loss alone. With S = 0 the op is a linear
    cross-entropy.

    With `teacher_weight` the teacher is another, frozen model (the base model, an average of
    weights): its logits are softcap * tanh((teacher @ teacher_weight.T + teacher_bias) / softcap),
    and it gets no gradient. The autoregressive loss, which trains, is then a call of its own.

    Logits exist for `chunk_tokens` rows of either side at a time, softmaxes are computed in fp32
    and the weight's gradient is summed in fp32. The gradients are made beside the loss and kept
    until backward ((6 S + 2 M) H V floating-point operations, 4 M H V more with a gradient through
    `ar`).

    Args:
        student: [S, H] float32, bfloat16 or float16 (float64 on the reference backend); S may be 0.
        teacher: [M, H] of the same dtype and device, M >= S; row i < S is student[i]'s. More rows
            than S need labels. No gradient of the consistency term flows into it, that of `ar`
            does. With teacher_weight [S, H2].
        weight: [V, H] of the same dtype and device, V >= 1.
        bias: [V] float32 or of student's dtype, or None.
        teacher_weight: [V, H2] of the same dtype and device: the head of the other model that
            teacher's rows belong to. Needs M = S and labels=None. No gradient reaches it.
        teacher_bias: [V] float32 or of student's dtype, or None; teacher_weight's.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: the teacher's share of the mixture, between 0 and 1; "jsd" only.
        temperature: > 0; of the consistency term. The autoregressive term has temperature 1.
        labels: [M] int64, the next token of each clean row; negative (-100, say): none. None: no
            autoregressive term.
        label_smoothing: in [0, 1), as in torch.nn.functional.cross_entropy.
        ar_weight: what `ar` counts in the loss.
        row_weights: [S] floating-point, >= 0, of the consistency term; 0 masks a row (padding, the
            prompt, rows before the first divergence), whatever its logits. None: all 1.
        softcap: a positive number, or None for none.
        chunk_tokens: rows of either side whose logits exist at a time, best a power of two; None:
            chosen from the free memory.
        recompute: keep ten numbers a row instead of gradients, and let backward compute the logits
            again, piece by piece of the vocabulary: 2 (S + M) H V operations more, and another
            4 S H V for "jsd". Besides the gradients themselves nothing of the weight's size or of a
            row's length is ever held.

    Returns:
        (loss, consistency, ar), each [] float32 (float64 for float64). Backward goes through `loss`
        alone; the other two are for logging and carry no gradient. There is no second derivative.

    Raises:
        ValueError: shapes, devices or numbers that do not fit; on a CPU also labels outside the
            vocabulary and negative weights (on a GPU a device-side assertion tells of them, so that
            nothing waits). TypeError: a wrong dtype. BackendError: see `use_backend`.
    """
    options = LossOptions(
        divergence,
        float(beta),
        float(temperature),
        float(label_smoothing),
        float(ar_weight),
        softcap,
        0 if chunk_tokens is None else chunk_tokens,
        recompute,
    )
    operands = Operands(
        student, teacher, weight, bias, teacher_weight, teacher_bias, labels, row_weights
    )
    check(operands, options, chunk_tokens)
    grad = torch.is_grad_enabled()
    wanted = Gradients(
        student=grad and student.requires_grad,
        teacher=grad and teacher.requires_grad and labels is not None,
        weight=grad and weight.requires_grad,
        bias=grad and bias is not None and bias.requires_grad,
    )
    # So that the loss does not claim to depend on what gets no gradient.
    operands = operands._replace(
        teacher=teacher if wanted.teacher else teacher.detach(),
        teacher_weight=None if teacher_weight is None else teacher_weight.detach(),
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
    )
    results = torch.ops.cllm_kernels.linear_consistency_loss.default(*operands, *options, *wanted)
    return results[0], results[1].detach(), results[2].detach()


_ARGUMENTS = (
    "Tensor student, Tensor teacher, Tensor weight, Tensor? bias, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? labels, Tensor? row_weights, str divergence, float beta, "
    "float temperature, float label_smoothing, float ar_weight, float? softcap, int chunk_tokens, "
    "bool recompute, bool student_gradient, bool teacher_gradient, bool weight_gradient, "
    "bool bias_gradient"
)
_TENSORS, _OPTIONS, _FLAGS = (len(x._fields) for x in (Operands, LossOptions, Gradients))
LIBRARY.define(
    f"linear_consistency_loss({_ARGUMENTS}) -> (Tensor loss, Tensor consistency, Tensor ar, "
    "Tensor d_student, Tensor d_teacher, Tensor d_weight, Tensor d_bias, Tensor common, "
    "Tensor state)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What backward runs where nothing was kept.
LIBRARY.define(
    f"linear_consistency_loss_gradients({_ARGUMENTS}, Tensor state, Tensor d_loss) -> "
    "(Tensor d_student, Tensor d_teacher, Tensor d_weight, Tensor d_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _unpacked(arguments: tuple) -> tuple[Operands, LossOptions, Gradients]:
    tensors = [None if tensor is None else tensor.detach() for tensor in arguments[:_TENSORS]]
    numbers = arguments[_TENSORS : _TENSORS + _OPTIONS]
    flags = arguments[_TENSORS + _OPTIONS : _TENSORS + _OPTIONS + _FLAGS]
    return Operands._make(tensors), LossOptions(*numbers), Gradients(*flags)


def _implementation(student: Tensor) -> Implementation:
    if student.dtype is torch.float64:
        return OP.in_float64(student.device)
    return OP.resolve(student.device)


@without_autocast
def _losses(*arguments: Any) -> tuple[Tensor, ...]:
    operands, options, wanted = _unpacked(arguments)
    check_values(operands)
    return tuple(_implementation(operands.student).losses(operands, options, wanted))


@without_autocast
def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    operands, options, wanted = _unpacked(arguments)
    implementation = _implementation(operands.student)
    return implementation.gradients(operands, options, wanted, *arguments[-2:])


def _fake_losses(*arguments: Any) -> tuple[Tensor, ...]:
    operands, options, wanted = _unpacked(arguments)
    student, teacher, weight, bias = operands[:4]
    wide = torch.promote_types(student.dtype, torch.float32)
    if options.recompute:
        wanted = Gradients(False, False, False, False)

    def fake(like: Tensor | None, need: bool, dtype: torch.dtype) -> Tensor:
        if like is None or not need:
            return student.new_empty(0)
        return student.new_empty(like.shape, dtype=dtype)

    losses = [student.new_empty((), dtype=wide) for _ in range(3)]
    state = (teacher.shape[0], STATE_FIELDS) if options.recompute else (0,)
    return (
        *losses,
        fake(student, wanted.student, student.dtype),
        fake(teacher, wanted.teacher, student.dtype),
        fake(weight, wanted.weight, wide),
        fake(bias, wanted.bias, wide),
        student.new_empty((), dtype=wide),
        student.new_empty(state, dtype=torch.float64),
    )


def _fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    operands, _, wanted = _unpacked(arguments)
    return tuple(
        arguments[0].new_empty(0) if tensor is None or not need else torch.empty_like(tensor)
        for tensor, need in zip(operands[:_FLAGS], wanted, strict=True)
    )


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, options, ctx.wanted = _unpacked(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:_FLAGS]]
    ctx.again = inputs[_TENSORS:] if options.recompute else None
    if options.recompute:
        ctx.save_for_backward(*inputs[:_TENSORS], output[-1])
    else:
        ctx.save_for_backward(*output[3:8])


def _backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * (_TENSORS + _OPTIONS)
    if d_loss is None:
        return (None,) * _FLAGS + rest
    if ctx.again is not None:
        *operands, state = ctx.saved_tensors
        gradients = torch.ops.cllm_kernels.linear_consistency_loss_gradients.default(
            *operands, *ctx.again, state, d_loss
        )
        needed = zip(gradients, ctx.wanted, strict=True)
        return (*(gradient if need else None for gradient, need in needed), *rest)
    *gradients, common = ctx.saved_tensors
    factor = d_loss * common
    # On a CPU it costs nothing to see that there is nothing to multiply; on a GPU it would wait.
    unit = eager(d_loss) and d_loss.device.type == "cpu" and float(factor) == 1.0
    scaled: list[Tensor | None] = []
    for gradient, need, dtype in zip(gradients, ctx.wanted, ctx.dtypes, strict=True):
        if not need:
            scaled.append(None)
        else:
            scaled.append(gradient.to(dtype) if unit else (gradient * factor).to(dtype))
    return (*scaled, *rest)


LIBRARY.impl("linear_consistency_loss", _losses, "CompositeExplicitAutograd")
LIBRARY.impl("linear_consistency_loss_gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::linear_consistency_loss", _fake_losses, lib=LIBRARY)
torch.library.register_fake(
    "cllm_kernels::linear_consistency_loss_gradients", _fake_gradients, lib=LIBRARY
)
torch.library.register_autograd(
    "cllm_kernels::linear_consistency_loss", _backward, setup_context=_keep, lib=LIBRARY
)
