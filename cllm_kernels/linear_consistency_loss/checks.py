"""What linear_consistency_loss refuses, each with one line that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllm_kernels._common import FLOAT_DTYPES, dtype_text, shape_text
from cllm_kernels.linear_consistency_loss.options import DIVERGENCES, LossOptions, Operands

_NAME = "linear_consistency_loss"


def check(operands: Operands, options: LossOptions, chunk_tokens: int | None) -> None:
    """ValueError or TypeError for operands that do not fit each other, and numbers out of range."""
    _check_shapes(operands)
    _check_types(operands)
    _check_numbers(options, chunk_tokens)


def _check_shapes(operands: Operands) -> None:
    student, teacher, weight = operands.student, operands.teacher, operands.weight
    if student.dim() != 2:
        raise ValueError(f"{_NAME}: student must be [S, H], not {shape_text(student)}")
    if teacher.dim() != 2:
        raise ValueError(f"{_NAME}: teacher must be [M, H], not {shape_text(teacher)}")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != student.shape[1]:
        raise ValueError(
            f"{_NAME}: weight must be [V, {student.shape[1]}] with V >= 1 to fit student "
            f"{shape_text(student)}, not {shape_text(weight)}"
        )
    _check_teacher(operands)
    for label, tensor, shape, described in (
        ("bias", operands.bias, weight.shape[:1], "one entry per row of weight"),
        ("teacher_bias", operands.teacher_bias, weight.shape[:1], "one entry per row of weight"),
        ("labels", operands.labels, teacher.shape[:1], "one entry per row of teacher"),
        ("row_weights", operands.row_weights, student.shape[:1], "one entry per row of student"),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{_NAME}: {label} must be [{shape[0]}], {described}, not {shape_text(tensor)}"
            )


def _check_teacher(operands: Operands) -> None:
    student, teacher, weight = operands.student, operands.teacher, operands.weight
    if operands.teacher_weight is not None:
        _check_other_head(operands, operands.teacher_weight)
        return
    if operands.teacher_bias is not None:
        raise ValueError(
            f"{_NAME}: teacher_bias without teacher_weight; the teacher's logits are made by "
            "weight and bias then"
        )
    if teacher.shape[1] != student.shape[1]:
        raise ValueError(
            f"{_NAME}: teacher must be [M, {student.shape[1]}] to fit student "
            f"{shape_text(student)} and weight {shape_text(weight)}, not {shape_text(teacher)}; "
            "the rows of another model need its teacher_weight"
        )
    if teacher.shape[0] < student.shape[0]:
        raise ValueError(
            f"{_NAME}: teacher must have a row for each of student {shape_text(student)}, "
            f"not {shape_text(teacher)}"
        )
    if teacher.shape[0] > student.shape[0] and operands.labels is None:
        raise ValueError(
            f"{_NAME}: teacher {shape_text(teacher)} has rows without a student "
            f"{shape_text(student)}; they only serve the autoregressive loss: pass labels"
        )


def _check_other_head(operands: Operands, teacher_weight: Tensor) -> None:
    student, teacher, weight = operands.student, operands.teacher, operands.weight
    if operands.labels is not None:
        raise ValueError(
            f"{_NAME}: labels with teacher_weight: the autoregressive loss trains the student's "
            "model, not the frozen teacher's; call once more without teacher_weight"
        )
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"{_NAME}: teacher with teacher_weight must have as many rows as student "
            f"{shape_text(student)}, not {shape_text(teacher)}"
        )
    if teacher_weight.shape != (weight.shape[0], teacher.shape[1]):
        raise ValueError(
            f"{_NAME}: teacher_weight must be [{weight.shape[0]}, {teacher.shape[1]}] to fit "
            f"weight {shape_text(weight)} and teacher {shape_text(teacher)}, "
            f"not {shape_text(teacher_weight)}"
        )


def _check_types(operands: Operands) -> None:
    student, labels, row_weights = operands.student, operands.labels, operands.row_weights
    if student.dtype not in (*FLOAT_DTYPES, torch.float64):
        raise TypeError(
            f"{_NAME}: student must be float32, bfloat16 or float16, "
            f"not {dtype_text(student.dtype)}"
        )
    for label in ("teacher", "weight", "teacher_weight"):
        tensor = getattr(operands, label)
        if tensor is not None and tensor.dtype != student.dtype:
            raise TypeError(
                f"{_NAME}: {label} is {dtype_text(tensor.dtype)} but student is "
                f"{dtype_text(student.dtype)}; they must have the same dtype"
            )
    for label, tensor in (("bias", operands.bias), ("teacher_bias", operands.teacher_bias)):
        if tensor is not None and tensor.dtype not in (student.dtype, torch.float32):
            raise TypeError(
                f"{_NAME}: {label} must be float32 or {dtype_text(student.dtype)}, "
                f"not {dtype_text(tensor.dtype)}"
            )
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"{_NAME}: labels must be int64, not {dtype_text(labels.dtype)}")
    if row_weights is not None and not row_weights.dtype.is_floating_point:
        raise TypeError(
            f"{_NAME}: row_weights must be floating-point, not {dtype_text(row_weights.dtype)}; "
            "pass row_weights.float()"
        )
    for label, tensor in operands._asdict().items():
        if tensor is not None and tensor.device != student.device:
            raise ValueError(
                f"{_NAME}: {label} is on {tensor.device} but student is on {student.device}"
            )


def _check_numbers(options: LossOptions, chunk_tokens: int | None) -> None:
    if options.divergence not in DIVERGENCES:
        raise ValueError(
            f"{_NAME}: divergence must be one of {', '.join(DIVERGENCES)}, "
            f"not {options.divergence!r}"
        )
    if options.divergence == "jsd" and not 0 < options.beta < 1:
        raise ValueError(
            f"{_NAME}: beta must lie between 0 and 1, not {options.beta}; its ends are divergence="
            '"forward_kl" and "reverse_kl" (in the limit, up to a factor)'
        )
    if not 1e-30 <= options.temperature <= 1e30:
        raise ValueError(
            f"{_NAME}: temperature must be a positive number (1e-30 to 1e30), not "
            f"{options.temperature}"
        )
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(
            f"{_NAME}: label_smoothing must lie in [0, 1), not {options.label_smoothing}"
        )
    if not math.isfinite(options.ar_weight):
        raise ValueError(f"{_NAME}: ar_weight must be finite, not {options.ar_weight}")
    cap = options.softcap
    if cap is not None and not (cap > 0 and math.isfinite(cap)):
        raise ValueError(f"{_NAME}: softcap must be a positive number or None, not {cap}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{_NAME}: chunk_tokens must be at least 1, not {chunk_tokens}")


def check_values(operands: Operands) -> None:
    """Labels and row weights in range: at once on a CPU, by a device-side assertion on a GPU.

    Called from inside the op, where there are values even under a compiler.
    """
    weight, labels, row_weights = operands.weight, operands.labels, operands.row_weights
    vocabulary = weight.shape[0]
    if weight.device.type == "cuda":
        if labels is not None:
            text = f"{_NAME}: labels must be less than the vocabulary of {vocabulary}"
            torch._assert_async((labels < vocabulary).all(), text)
        if row_weights is not None:
            text = f"{_NAME}: row_weights must not be negative"
            torch._assert_async((row_weights >= 0).all(), text)
        return
    if labels is not None and labels.numel() and int(labels.max()) >= vocabulary:
        raise ValueError(
            f"{_NAME}: labels {shape_text(labels)} must be less than the vocabulary of weight "
            f"{shape_text(weight)}, but one is {int(labels.max())}; mask a row by -100"
        )
    if row_weights is not None and row_weights.numel() and float(row_weights.min()) < 0:
        raise ValueError(
            f"{_NAME}: row_weights must not be negative, but one is {float(row_weights.min())}"
        )
