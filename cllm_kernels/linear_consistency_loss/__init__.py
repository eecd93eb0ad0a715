"""linear_consistency_loss: the language-model head and the loss of consistency training in one op,
the logits of a few tokens at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import FLOAT_DTYPES, LIBRARY, dtype_text, eager, shape_text
from cllm_kernels.linear_consistency_loss.options import (
    DIVERGENCES,
    Gradients,
    LossOptions,
    Results,
)


def _reference() -> Any:
    from cllm_kernels.linear_consistency_loss import reference

    return reference.linear_consistency_loss


def _cpp() -> Any:
    from cllm_kernels.linear_consistency_loss import native

    return native.linear_consistency_loss_cpu


def _cuda() -> Any:
    from cllm_kernels.linear_consistency_loss import native

    return native.linear_consistency_loss_cuda


def _triton() -> Any:
    from cllm_kernels.linear_consistency_loss import triton_kernel

    return triton_kernel.linear_consistency_loss


OP = register(
    Op(
        name="linear_consistency_loss",
        implementations={"reference": _reference, "cpp": _cpp, "cuda": _cuda, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )
)


def linear_consistency_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
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

        consistency = sum_i w_i D(p_i, q_i) / sum_i w_i                w = row_weights
        ar          = mean over labelled rows of the cross-entropy of z(teacher[i]) with labels[i]
        loss        = consistency + ar_weight * ar

    D is KL(p || q) ("forward_kl"; Kou et al. 2024, arXiv 2403.00835, eq. 6 and 7), KL(q || p)
    ("reverse_kl"), or beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q
    ("jsd"; Agarwal et al. 2024, arXiv 2306.13649, sec. 2). The teacher's rows are the clean ones,
    which are also those of the autoregressive loss, so their logits are made once.

    Logits exist for `chunk_tokens` rows of either side at a time, softmaxes are computed in fp32
    and the weight's gradient is summed in fp32. The gradients are made beside the loss and kept
    until backward (8 M H V floating-point operations, 12 with a gradient through `ar`).

    Args:
        student: [M, H] float32, bfloat16 or float16 (float64 on the reference backend); M may be 0.
        teacher: [M, H] of the same dtype and device. No gradient of the consistency term flows
            into it, that of `ar` does.
        weight: [V, H] of the same dtype and device, V >= 1.
        bias: [V] float32 or of student's dtype, or None.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: the teacher's share of the mixture, between 0 and 1; "jsd" only.
        temperature: > 0; of the consistency term. The autoregressive term has temperature 1.
        labels: [M] int64, the next token of each clean row; negative (-100, say): none. None: no
            autoregressive term.
        label_smoothing: in [0, 1), as in torch.nn.functional.cross_entropy.
        ar_weight: what `ar` counts in the loss.
        row_weights: [M] floating-point, >= 0, of the consistency term; 0 masks a row (padding, the
            prompt, rows before the first divergence), whatever its logits. None: all 1.
        softcap: a positive number, or None for none.
        chunk_tokens: rows of either side whose logits exist at a time, best a power of two; None:
            chosen from the free memory.
        recompute: keep no gradients: backward computes the logits again (12 M H V operations, 20
            with a gradient through `ar`) and nothing of the weight's size is held in between.

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
    )
    _check(student, teacher, weight, bias, labels, row_weights, options, chunk_tokens)
    _check_values(weight, labels, row_weights)
    grad = torch.is_grad_enabled()
    wanted = Gradients(
        student=grad and student.requires_grad,
        teacher=grad and teacher.requires_grad and labels is not None,
        weight=grad and weight.requires_grad,
        bias=grad and bias is not None and bias.requires_grad,
    )
    if not wanted.teacher:  # so that the loss does not claim to depend on it
        teacher = teacher.detach()
    results = torch.ops.cllm_kernels.linear_consistency_loss.default(
        student, teacher, weight, bias, labels, row_weights, *options, *wanted, recompute
    )
    return results[0], results[1].detach(), results[2].detach()


def _check(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    row_weights: Tensor | None,
    options: LossOptions,
    chunk_tokens: int | None,
) -> None:
    name = "linear_consistency_loss"
    if student.dim() != 2:
        raise ValueError(f"{name}: student must be [M, H], not {shape_text(student)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"{name}: teacher must have student's shape {shape_text(student)}, "
            f"not {shape_text(teacher)}"
        )
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != student.shape[1]:
        raise ValueError(
            f"{name}: weight must be [V, {student.shape[1]}] with V >= 1 to fit student "
            f"{shape_text(student)}, not {shape_text(weight)}"
        )
    if student.dtype not in (*FLOAT_DTYPES, torch.float64):
        raise TypeError(
            f"{name}: student must be float32, bfloat16 or float16, not {dtype_text(student.dtype)}"
        )
    for label, tensor, shape, described in (
        ("bias", bias, weight.shape[:1], "one entry per row of weight"),
        ("labels", labels, student.shape[:1], "one entry per row of teacher"),
        ("row_weights", row_weights, student.shape[:1], "one entry per row of student"),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name}: {label} must be [{shape[0]}], {described}, not {shape_text(tensor)}"
            )
    for label, tensor in (("teacher", teacher), ("weight", weight)):
        if tensor.dtype != student.dtype:
            raise TypeError(
                f"{name}: {label} is {dtype_text(tensor.dtype)} but student is "
                f"{dtype_text(student.dtype)}; they must have the same dtype"
            )
    if bias is not None and bias.dtype not in (student.dtype, torch.float32):
        raise TypeError(
            f"{name}: bias must be float32 or {dtype_text(student.dtype)}, "
            f"not {dtype_text(bias.dtype)}"
        )
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"{name}: labels must be int64, not {dtype_text(labels.dtype)}")
    if row_weights is not None and not row_weights.dtype.is_floating_point:
        raise TypeError(
            f"{name}: row_weights must be floating-point, not {dtype_text(row_weights.dtype)}; "
            "pass row_weights.float()"
        )
    for label, tensor in (
        *(("teacher", teacher), ("weight", weight), ("bias", bias)),
        *(("labels", labels), ("row_weights", row_weights)),
    ):
        if tensor is not None and tensor.device != student.device:
            raise ValueError(
                f"{name}: {label} is on {tensor.device} but student is on {student.device}"
            )
    _check_numbers(options, chunk_tokens)


def _check_numbers(options: LossOptions, chunk_tokens: int | None) -> None:
    name = "linear_consistency_loss"
    if options.divergence not in DIVERGENCES:
        raise ValueError(
            f"{name}: divergence must be one of {', '.join(DIVERGENCES)}, "
            f"not {options.divergence!r}"
        )
    if options.divergence == "jsd" and not 0 < options.beta < 1:
        raise ValueError(
            f"{name}: beta must lie between 0 and 1, not {options.beta}; its ends are divergence="
            '"forward_kl" and "reverse_kl" (in the limit, up to a factor)'
        )
    if not (options.temperature > 0 and math.isfinite(options.temperature)):
        raise ValueError(
            f"{name}: temperature must be a positive number, not {options.temperature}"
        )
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(
            f"{name}: label_smoothing must lie in [0, 1), not {options.label_smoothing}"
        )
    if not math.isfinite(options.ar_weight):
        raise ValueError(f"{name}: ar_weight must be finite, not {options.ar_weight}")
    cap = options.softcap
    if cap is not None and not (cap > 0 and math.isfinite(cap)):
        raise ValueError(f"{name}: softcap must be a positive number or None, not {cap}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{name}: chunk_tokens must be at least 1, not {chunk_tokens}")


def _check_values(weight: Tensor, labels: Tensor | None, row_weights: Tensor | None) -> None:
    """Labels and row weights in range: at once on a CPU, by a device-side assertion on a GPU."""
    name, vocabulary = "linear_consistency_loss", weight.shape[0]
    if weight.device.type == "cuda":
        if labels is not None:
            text = f"{name}: labels must be less than the vocabulary of {vocabulary}"
            torch._assert_async((labels < vocabulary).all(), text)
        if row_weights is not None:
            text = f"{name}: row_weights must not be negative"
            torch._assert_async((row_weights >= 0).all(), text)
        return
    tensors = [tensor for tensor in (labels, row_weights) if tensor is not None]
    if not tensors or not eager(*tensors):  # nothing to look at while a compiler traces
        return
    if labels is not None and labels.numel() and int(labels.max()) >= vocabulary:
        raise ValueError(
            f"{name}: labels {shape_text(labels)} must be less than the vocabulary of weight "
            f"{shape_text(weight)}, but one is {int(labels.max())}; mask a row by -100"
        )
    if row_weights is not None and row_weights.numel() and float(row_weights.min()) < 0:
        raise ValueError(
            f"{name}: row_weights must not be negative, but one is {float(row_weights.min())}"
        )


_ARGUMENTS = (
    "Tensor student, Tensor teacher, Tensor weight, Tensor? bias, Tensor? labels, "
    "Tensor? row_weights, str divergence, float beta, float temperature, float label_smoothing, "
    "float ar_weight, float? softcap, int chunk_tokens, bool student_gradient, "
    "bool teacher_gradient, bool weight_gradient, bool bias_gradient"
)
LIBRARY.define(
    f"linear_consistency_loss({_ARGUMENTS}, bool recompute) -> (Tensor loss, Tensor consistency, "
    "Tensor ar, Tensor d_student, Tensor d_teacher, Tensor d_weight, Tensor d_bias, Tensor common)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What backward runs where nothing was kept.
LIBRARY.define(
    f"linear_consistency_loss_gradients({_ARGUMENTS}) -> (Tensor d_student, Tensor d_teacher, "
    "Tensor d_weight, Tensor d_bias, Tensor common)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_TENSORS, _OPTIONS = 6, len(LossOptions._fields)


def _run(arguments: tuple, wanted: Gradients) -> Results:
    tensors, numbers = arguments[:_TENSORS], arguments[_TENSORS : _TENSORS + _OPTIONS]
    student = tensors[0]
    implementation = OP.resolve(student.device)
    if student.dtype is torch.float64:
        implementation = OP.in_float64(student.device)
    detached = [None if tensor is None else tensor.detach() for tensor in tensors]
    return implementation(*detached, LossOptions(*numbers), wanted)


def _dispatched(*arguments: Any) -> tuple[Tensor, ...]:
    *flags, recompute = arguments[_TENSORS + _OPTIONS :]
    wanted = Gradients(False, False, False, False) if recompute else Gradients(*flags)
    return tuple(_run(arguments, wanted))


def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_run(arguments, Gradients(*arguments[_TENSORS + _OPTIONS :])))[3:]


def _fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    student, teacher, weight, bias = arguments[:4]
    wanted = Gradients(*arguments[_TENSORS + _OPTIONS :])
    wide = torch.promote_types(student.dtype, torch.float32)
    return (
        student.new_empty(student.shape if wanted.student else (0,)),
        student.new_empty(teacher.shape if wanted.teacher else (0,)),
        _fake_wide(student, weight.shape if wanted.weight else None, wide),
        _fake_wide(student, bias.shape if wanted.bias else None, wide),
        student.new_empty((), dtype=wide),
    )


def _fake_wide(student: Tensor, shape: Any, wide: torch.dtype) -> Tensor:
    return student.new_empty(0) if shape is None else student.new_empty(shape, dtype=wide)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, recompute = arguments
    if recompute:
        rest[_TENSORS + _OPTIONS :] = [False] * 4
    student = arguments[0]
    wide = torch.promote_types(student.dtype, torch.float32)
    losses = [student.new_empty((), dtype=wide) for _ in range(3)]
    return (*losses, *_fake_gradients(*rest))


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *rest, recompute = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:4]]
    ctx.wanted = Gradients(*rest[_TENSORS + _OPTIONS :])
    ctx.again = None
    if recompute:
        ctx.again = rest[_TENSORS:]
        ctx.save_for_backward(*rest[:_TENSORS])
    else:
        ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple:
    nothing = (None,) * (_TENSORS + _OPTIONS + 5 - 4)
    if d_loss is None:
        return (None, None, None, None, *nothing)
    kept = ctx.saved_tensors
    if ctx.again is not None:
        kept = torch.ops.cllm_kernels.linear_consistency_loss_gradients.default(*kept, *ctx.again)
    *gradients, common = kept
    factor = d_loss * common
    # On a CPU it costs nothing to see that there is nothing to multiply; on a GPU it would wait.
    unit = eager(d_loss) and d_loss.device.type == "cpu" and float(factor) == 1.0
    scaled: list[Tensor | None] = []
    for gradient, need, dtype in zip(gradients, ctx.wanted, ctx.dtypes, strict=True):
        if not need:
            scaled.append(None)
        else:
            scaled.append(gradient.to(dtype) if unit else (gradient * factor).to(dtype))
    return (*scaled, *nothing)


LIBRARY.impl("linear_consistency_loss", _dispatched, "CompositeExplicitAutograd")
LIBRARY.impl("linear_consistency_loss_gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::linear_consistency_loss", _fake, lib=LIBRARY)
torch.library.register_fake(
    "cllm_kernels::linear_consistency_loss_gradients", _fake_gradients, lib=LIBRARY
)
torch.library.register_autograd(
    "cllm_kernels::linear_consistency_loss", _backward, setup_context=_keep, lib=LIBRARY
)
