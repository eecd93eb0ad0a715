"""The loss of consistency training on a packed batch: one forward of the decoder, and the logits of
the rows that count, never held whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from cllm_kernels import linear_consistency_loss

from ..head import LanguageHead
from .config import ConsistencyConfig
from .forwards import gated_hidden_states, packed_hidden_states
from .gate import AdapterGate
from .packing import CLEAN_FIELDS, ROW_FIELDS, TOKEN_FIELDS
from .teachers import Teacher

# what a training loop may hand over beside the batch
_IGNORED_FIELDS = (
    "nominal_tokens",
    "row_numbers",
    "return_dict",
    "use_cache",
    "num_items_in_batch",
)


@dataclass
class ConsistencyOutput(ModelOutput):
    """What a patched model returns for a packed batch, each [].

    Attributes:
        loss: to call backward on. With `totals` in the batch it is this batch's part of the whole.
        consistency_loss, ar_loss: its two terms (the second before `ar_weight`), for logging.
        tokens: counted rows of the consistency loss, int64.
        guesses: [B, R] int64: the model's argmax in the rows of `student_index`; for
            ``sampling="visited"`` alone.
    """

    loss: Tensor | None = None
    consistency_loss: Tensor | None = None
    ar_loss: Tensor | None = None
    tokens: Tensor | None = None
    guesses: Tensor | None = None


def packed_loss(
    head: LanguageHead,
    config: ConsistencyConfig,
    kinds: dict[str, int | None],
    teacher: Teacher | None,
    batch: dict[str, Any],
    gate: AdapterGate | None = None,
) -> ConsistencyOutput:
    """The loss of a batch of `ConsistencyCollator`.

    Args:
        head: of the model in training.
        kinds: its attention, of `traits.mask_kinds`.
        teacher: None: the model itself.
        batch: the collator's fields, and possibly `totals`, two numbers: the counted rows and the
            labels that the sums are divided by, instead of the batch's own. Given those of a whole
            batch, the losses of its micro-batches, or of several processes, add up to its loss.
        gate: of the adapters, for gated training; the teacher is then the model itself, whose clean
            columns are the base.

    Raises:
        ValueError: a field that is missing, of another dtype or shape, or points out of its row.
    """
    totals = check_batch(batch)
    if gate is None:
        hidden = packed_hidden_states(head, kinds, batch)
    else:
        hidden = gated_hidden_states(head, kinds, batch, gate)
    # clean rows are the frozen base under a gate: there is nothing to train in them
    ar_weight = 0.0 if gate is not None else config.ar_weight
    student, taught, clean = (
        _flat(batch[name], hidden) for name in ("student_index", "teacher_index", "clean_index")
    )
    weights = batch["row_weights"].flatten().to(hidden.device)
    labels = torch.cat([batch["teacher_labels"].flatten(), batch["clean_labels"].flatten()])
    labels = labels.to(hidden.device)
    rows = hidden.flatten(0, 1)[torch.cat([student, taught, clean])]
    operand, weight, bias = head.operands(rows)
    ar_operand = operand[len(student) :]
    if ar_weight == 0:  # reported, not trained
        ar_operand = ar_operand.detach()
    row_share, label_share = _shares(weights, labels, totals)
    head_options: dict[str, Any] = {
        "bias": bias,
        "softcap": head.softcap,
        "chunk_tokens": config.chunk_tokens,
        "recompute": config.recompute,
    }
    divergence: dict[str, Any] = {
        "divergence": config.divergence,
        "beta": config.beta,
        "temperature": config.temperature,
        "row_weights": weights,
    }
    ar: dict[str, Any] = {"labels": labels, "label_smoothing": config.label_smoothing}
    if teacher is None:
        # row_share * (consistency + w' * ar): the op's backward knows one sum
        scale = row_share or 1.0
        loss, consistency, ar_loss = linear_consistency_loss(
            operand[: len(student)],
            ar_operand,
            weight,
            **head_options,
            **divergence,
            **ar,
            ar_weight=ar_weight * label_share / scale,
        )
        loss = loss * scale
    else:
        taught_rows, teacher_weight, teacher_bias = _teacher_rows(
            teacher, head, kinds, config, batch
        )
        taught_loss, consistency, _ = linear_consistency_loss(
            operand[: len(student)],
            taught_rows.to(operand),
            weight,
            **head_options,
            **divergence,
            teacher_weight=teacher_weight.to(operand),
            teacher_bias=None if teacher_bias is None else teacher_bias.to(operand),
        )
        ar_part, _, ar_loss = linear_consistency_loss(
            operand[:0], ar_operand, weight, **head_options, **ar, ar_weight=config.ar_weight
        )
        loss = taught_loss * row_share + ar_part * label_share
    guesses = None
    if config.sampling == "visited":
        with torch.no_grad():
            guesses = head.argmax(rows[: len(student)]).view(batch["student_index"].shape)
    return ConsistencyOutput(
        loss=loss,
        consistency_loss=consistency * row_share,
        ar_loss=ar_loss * label_share,
        tokens=(weights > 0).sum(),
        guesses=guesses,
    )


@torch.no_grad()
def _teacher_rows(
    teacher: Teacher,
    head: LanguageHead,
    kinds: dict[str, int | None],
    config: ConsistencyConfig,
    batch: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scaled hidden states [B * R, H2] of another teacher's rows, its weight and bias."""
    columns = batch["input_ids"].shape[1]
    if config.consistency == "global":  # clean columns come first and suffice
        clean = (batch["segment_ids"] == 0) & (batch["sample_ids"] >= 0)
        longest = int(clean.sum(dim=1).max())
        columns = min(columns, -(-longest // 64) * 64)
    with teacher.ready(head) as other:
        hidden = packed_hidden_states(other, kinds, batch, columns)
        rows = hidden.flatten(0, 1)[_flat(batch["teacher_index"], hidden)]
        return other.operands(rows)


def _flat(index: Tensor, hidden: Tensor) -> Tensor:
    """Columns [B, R] of rows as places [B * R] in the flattened hidden states [B * S, H]."""
    # a model spread over devices ends on another one than its batch
    rows = torch.arange(len(index), device=hidden.device)
    return (index.to(hidden.device) + hidden.shape[1] * rows[:, None]).flatten()


def _shares(
    weights: Tensor, labels: Tensor, totals: tuple[float, float] | None
) -> tuple[float, float]:
    """The batch's part of the counted rows, and of the labels, that its losses are means over."""
    if totals is None:
        return 1.0, 1.0
    # one readback, before anything of this batch is waited for
    counted = torch.stack([weights.sum().double(), (labels >= 0).sum().double()]).tolist()
    for total, own, what in zip(totals, counted, ("rows", "labels"), strict=True):
        if total < own * (1 - 1e-6):
            raise ValueError(
                f"totals counts {total:g} {what}, but this batch alone has {own:g}; give the sums "
                "over all micro-batches and processes"
            )
    rows, labelled = (
        own / total if own else 0.0 for own, total in zip(counted, totals, strict=True)
    )
    return rows, labelled


def check_batch(batch: dict[str, Any]) -> tuple[float, float] | None:
    """Refuse a batch that is not of `ConsistencyCollator`'s form; its `totals`, if it has any."""
    known = (*TOKEN_FIELDS, *ROW_FIELDS, *CLEAN_FIELDS, *_IGNORED_FIELDS, "totals")
    # PEFT hands on every argument that its own forward names, as None
    unknown = sorted(name for name in set(batch) - set(known) if batch[name] is not None)
    if unknown:
        raise ValueError(
            f"a packed batch has no field {unknown[0]!r}; batches are made by ConsistencyCollator"
        )
    for names in (TOKEN_FIELDS, ROW_FIELDS, CLEAN_FIELDS):
        for name in names:
            _check_field(batch, name, names[0])
    columns = batch["input_ids"].shape[1]
    for name in ("student_index", "teacher_index", "clean_index"):
        index = batch[name]
        # on a GPU the gather's own device-side assertion tells, so that nothing waits
        if not index.is_cuda and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= columns:
                raise ValueError(
                    f"{name} points to column {low if low < 0 else high} of a row of {columns}"
                )
    totals = batch.get("totals")
    if totals is None:
        return None
    good = isinstance(totals, tuple | list) and len(totals) == 2
    if not (good and all(math.isfinite(total) and total >= 0 for total in totals)):
        raise ValueError(
            "totals must be two numbers >= 0, the counted rows and the labels of the whole batch, "
            f"not {totals!r}"
        )
    return float(totals[0]), float(totals[1])


def _check_field(batch: dict[str, Any], name: str, model_name: str) -> None:
    value = batch.get(name)
    if value is None:
        raise ValueError(f"a packed batch needs {name}; batches are made by ConsistencyCollator")
    if not isinstance(value, Tensor) or value.dim() != 2:
        form = f"[{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else type(value)
        raise ValueError(f"{name} must be a tensor of two dimensions, not {form}")
    if name == "row_weights":
        if not value.dtype.is_floating_point:
            raise ValueError(f"row_weights must be floating-point, not {value.dtype}")
    elif value.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, not {value.dtype}")
    like = batch[model_name]
    if value.shape != like.shape or len(value) != len(batch["input_ids"]):
        raise ValueError(
            f"{name} is {list(value.shape)} and does not fit {model_name} {list(like.shape)} "
            f"in a batch of {len(batch['input_ids'])} rows"
        )
    if value.device != batch["input_ids"].device:
        raise ValueError(
            f"{name} is on {value.device} but input_ids is on {batch['input_ids'].device}"
        )
