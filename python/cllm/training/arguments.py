"""`ConsistencyTrainingArguments`: transformers' training arguments and those of consistency
training, checked where they are written down."""

from __future__ import annotations

import importlib.util
import math
import os
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin

import torch
from transformers import TrainingArguments

from .config import ConsistencyConfig
from .quality import QualityBound

CONSISTENCY_FIELDS = tuple(entry.name for entry in fields(ConsistencyConfig))


@dataclass
class ConsistencyTrainingArguments(TrainingArguments):
    """Arguments of `ConsistencyTrainer`.

    Every field of `transformers.TrainingArguments` and of `ConsistencyConfig` is one of these, and:

    Attributes:
        augment: share of the wrong tokens that is put right in an extra state behind each of
            Jacobi's own (`AugmentedTrajectories`); 0: no such states. For global consistency.
        row_tokens: most columns of a packed row; samples share a row while they fit. None: one
            sample a row.
        lora_r: rank of LoRA adapters; 0 trains all weights.
        lora_from: folder of adapters in PEFT's format to go on from (their rank, scale and
            modules); a run of its own, unlike resuming: optimiser, schedule and windows begin anew.
        lora_alpha: scale of the adapters; None: 2 * `lora_r`.
        lora_dropout: of the adapters.
        lora_targets: names of modules that get one, or "all-linear".
        merge_lora: save the final and the best model with the adapters merged into the weights, as
            a plain transformers model; checkpoints to resume from keep them apart.
        eval_max_new_tokens: length limit of the texts that an evaluation decodes.
        eval_block_size: n of Jacobi decoding there; None: that of the trajectories.
        max_nll_increase: quality bound: how far the negative log-likelihood per token of the
            model's text under the base model may lie above that of the base's own text.
        repetition_slack: how far its repetition rate may lie above the base's.
        quality_patience: evaluations in a row outside the bound that end the training.
        stop_on_quality: False trains on whatever the quality; checkpoints outside the bound are
            still never chosen.

    Raises:
        ValueError: naming every argument that has a bad value.
    """

    consistency: str = field(default="global", metadata={"help": "global or local"})
    divergence: str = field(default="forward_kl", metadata={"help": "forward_kl, reverse_kl, jsd"})
    beta: float = field(default=0.5, metadata={"help": "the teacher's share in jsd"})
    temperature: float = field(default=1.0, metadata={"help": "of both distributions"})
    ar_weight: float = field(default=10.0, metadata={"help": "weight of the autoregressive loss"})
    label_smoothing: float = field(default=0.1, metadata={"help": "of the autoregressive loss"})
    teacher: str = field(default="self", metadata={"help": "self, base or ema"})
    ema_decay: float = field(default=0.999, metadata={"help": "of the ema teacher, per step"})
    sampling: str = field(default="per_block", metadata={"help": "which noisy states"})
    states: int = field(default=1, metadata={"help": "noisy states a response or a block"})
    window_size: int | list[int] | None = field(
        default=None, metadata={"help": "tokens of a visited window, or several sizes in turn"}
    )
    row_decay: float = field(default=1.0, metadata={"help": "weight of a window's later rows"})
    schedule_window: int = field(default=4, metadata={"help": "blocks from low to high noise"})
    chunk_tokens: int | None = field(default=None, metadata={"help": "rows with logits at a time"})
    recompute: bool = field(default=False, metadata={"help": "compute logits twice, save memory"})
    gated: bool = field(default=False, metadata={"help": "adapters that guess and decide nothing"})
    clean_cache_gib: float = field(default=0.0, metadata={"help": "GiB for clean texts, gated"})

    augment: float = field(default=0.0, metadata={"help": "share put right in extra states"})
    row_tokens: int | None = field(default=None, metadata={"help": "columns of a packed row"})

    lora_r: int = field(default=0, metadata={"help": "LoRA rank; 0 trains all weights"})
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA scale"})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    lora_targets: str | list[str] = field(
        default="all-linear", metadata={"help": "modules that get an adapter"}
    )
    lora_from: str | None = field(
        default=None, metadata={"help": "folder of adapters to go on from, in place of lora_r"}
    )
    merge_lora: bool = field(default=False, metadata={"help": "save the model with LoRA merged"})

    eval_max_new_tokens: int = field(default=128, metadata={"help": "tokens a text in evaluation"})
    eval_block_size: int | None = field(default=None, metadata={"help": "n in evaluation"})
    max_nll_increase: float = field(default=0.05, metadata={"help": "bound on the likelihood"})
    repetition_slack: float = field(default=0.01, metadata={"help": "bound on the repetition"})
    quality_patience: int = field(default=2, metadata={"help": "evaluations outside the bound"})
    stop_on_quality: bool = field(default=True, metadata={"help": "stop outside of the bound"})

    # other defaults than transformers' own
    per_device_train_batch_size: int = field(default=1, metadata={"help": "responses a forward"})
    learning_rate: float = field(default=2e-5, metadata={"help": "the highest learning rate"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "times through the responses"})
    logging_steps: float = field(default=10, metadata={"help": "optimiser steps between logs"})
    # the loss is checked here, and a bad one ends the run instead of being hidden from the log
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide a bad loss"})
    # a collator makes the model's inputs from TrainingExample; no column is unused
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False"})

    def __post_init__(self) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise ValueError("training needs accelerate; pip install 'cllm-kernels[train]'")
        problems = wrong_types(self)
        if not problems:
            problems = self._problems()
        if problems:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))
        # raises by itself, naming the fields
        self.consistency_config()
        # unless it is told to, transformers starts no process group without an accelerator: the
        # processes of torchrun would each train a model of their own into one folder
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()

    def consistency_config(self) -> ConsistencyConfig:
        """The fields that say what the loss is."""
        return ConsistencyConfig(**{name: getattr(self, name) for name in CONSISTENCY_FIELDS})

    def quality_bound(self) -> QualityBound:
        """The bound that the best checkpoint must keep."""
        return QualityBound(self.max_nll_increase, self.repetition_slack)

    def _problems(self) -> list[str]:
        problems = []
        for name, least in (
            ("row_tokens", 1),
            ("lora_r", 0),
            ("eval_max_new_tokens", 1),
            ("eval_block_size", 1),
            ("quality_patience", 1),
            ("max_nll_increase", 0),
            ("repetition_slack", 0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                problems.append(f"{name} must be at least {least}, not {value!r}")
        if self.lora_from is not None and self.lora_r:
            problems.append("lora_from says what the adapters are; leave lora_r out")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            problems.append(f"lora_alpha must be positive, not {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout must lie in [0, 1), not {self.lora_dropout!r}")
        if not 0 <= self.augment < 1:
            problems.append(f"augment must lie in [0, 1), not {self.augment!r}")
        if self.augment and self.consistency == "local":
            problems.append("augment needs consistency='global': its states have no next one")
        if self.sampling == "visited" and self.dataloader_num_workers:
            problems.append(
                "sampling='visited' keeps its windows in this process; dataloader_num_workers must "
                "be 0"
            )
        if self.sampling == "visited" and self.augment:
            problems.append("augment adds states, which sampling='visited' does not use")
        if self.merge_lora and self.gated:
            problems.append(
                "a gated adapter is never merged: merged weights would decide the text, too; leave "
                "merge_lora out"
            )
        elif self.merge_lora and not (self.lora_r or self.lora_from):
            problems.append("merge_lora needs adapters to merge; set lora_r")
        if self.remove_unused_columns:
            problems.append(
                "remove_unused_columns must be False: the collator reads examples, not columns"
            )
        if self.label_smoothing_factor:
            problems.append(
                "label_smoothing_factor belongs to transformers' own loss; use label_smoothing"
            )
        if self.load_best_model_at_end or self.metric_for_best_model is not None:
            problems.append(
                "the best checkpoint is chosen under the quality bound and kept in "
                "best_checkpoint; leave load_best_model_at_end and metric_for_best_model alone"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            problems.append(
                "train_sampling_strategy must be 'random' or 'sequential', not "
                f"{self.train_sampling_strategy!r}"
            )
        return problems


def wrong_types(arguments: TrainingArguments) -> list[str]:
    """Fields whose value is of another type than they are declared with, in words.

    Only plain types are looked at (numbers, text, True and False, lists of them): a recipe file
    holds no others.
    """
    problems = []
    hints = typing.get_type_hints(type(arguments))
    for entry in fields(arguments):
        value = getattr(arguments, entry.name)
        allowed = _plain_types(hints.get(entry.name))
        # a flag that takes text, and may stand there without it
        bare = "const" in entry.metadata and value == entry.metadata["const"]
        if allowed is None or value is None or bare or _is_one_of(value, allowed):
            continue
        names = " or ".join(_NAMES[kind] for kind in allowed)
        problems.append(f"{entry.name} must be {names}, not {value!r}")
    return problems


_NAMES: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
}


def _plain_types(hint: Any) -> list[Any] | None:
    """The plain types of a hint, or None if it allows others too."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        found: list[Any] = []
        for part in get_args(hint):
            if part is type(None):
                continue
            plain = _plain_types(part)
            if plain is None:
                return None
            found += plain
        return found
    plain_type = get_origin(hint) or hint
    return [plain_type] if plain_type in _NAMES else None


def _is_one_of(value: Any, allowed: list[Any]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, float) and float in allowed:
        return not math.isnan(value)
    if isinstance(value, int) and float in allowed:
        return True
    return isinstance(value, tuple(allowed))
