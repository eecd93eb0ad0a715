"""Training runs of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from cllm.training.arguments import ConsistencyTrainingArguments
from cllm.training.trainer import ConsistencyTrainer
from tests.decoding.tiny_models import fresh_model
from tests.decoding.tokenizer import letters_tokenizer

EVAL_PROMPTS = ["the cat", "a dog sat on", "how many eggs"]


def tiny_trainer(
    trajectories: Path,
    output: Path,
    *,
    model: Any = None,
    dataset: Any = None,
    prompts: Any = None,
    base_model: Any = None,
    **settings: Any,
) -> ConsistencyTrainer:
    """A trainer of a fresh tiny Llama; further keywords are training arguments."""
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "eval_max_new_tokens": 16,
    }
    torch.manual_seed(0)
    return ConsistencyTrainer(
        fresh_model("llama") if model is None else model,
        ConsistencyTrainingArguments(**{**defaults, **settings}),
        trajectories if dataset is None else dataset,
        processing_class=letters_tokenizer(),
        eval_prompts=prompts,
        base_model=base_model,
    )


def losses(trainer: ConsistencyTrainer) -> list[tuple[float, float, float]]:
    """(loss, consistency, autoregressive) of every training log."""
    names = ("loss", "consistency_loss", "ar_loss")
    history = trainer.state.log_history
    return [tuple(entry[name] for name in names) for entry in history if "loss" in entry]


def parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_same_parameters(left, right, tolerance):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance)


class StopAt(TrainerCallback):
    """Interrupts a run right after a step, as a user does."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def whole_and_interrupted(
    make_trainer: Any, folder: Path, step: int, settings: dict[str, Any]
) -> tuple[ConsistencyTrainer, ConsistencyTrainer]:
    """A run, in ``folder/whole``, and the same interrupted at `step` and resumed, in
    ``folder/parts``."""
    whole = make_trainer(**{**settings, "output_dir": str(folder / "whole")})
    whole.train()
    settings = {**settings, "output_dir": str(folder / "parts")}
    first = make_trainer(**settings)
    first.add_callback(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make_trainer(**settings)
    second.train(resume_from_checkpoint=True)
    return whole, second
