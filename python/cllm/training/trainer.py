"""`ConsistencyTrainer`: transformers' Trainer for consistency training (CLLM, arXiv 2403.00835)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, set_seed
from transformers.utils import logging

from ..evaluation import Evaluation
from ..training_patch import TrainingHandle, patch_training
from .arguments import ConsistencyTrainingArguments
from .checkpoints import (
    STATE_FILE,
    NamedCheckpoints,
    check_steps_left,
    checkpoint_to_resume,
    read_state,
    read_tensors,
    recover_folder,
    replaced_folder,
    write_json,
)
from .descriptions import save_descriptions
from .finite import NonFiniteLossError, check_finite
from .held_out import HeldOut
from .hooks import StepHooks
from .inputs import collator, data_seed, end_tokens, training_examples, trajectories
from .lora import add_adapters, is_peft, lora_layers, merged, without_input_casts
from .meter import Counts, Meter
from .order import EpochOrder
from .quality import QualityWatch, Verdict
from .visited import HostCopy

logger = logging.get_logger(__name__)

__all__ = ["ConsistencyTrainer", "NonFiniteLossError"]

BEST = "best_checkpoint"
_TEACHER_FILE = "teacher.pt"
_WINDOWS_FILE = "windows.pt"


class ConsistencyTrainer(NamedCheckpoints, Trainer):
    """Trains a causal language model on Jacobi trajectories.

    The model is patched for the length of `train` and as it was after it. Losses and gradients are
    those of the whole batch of an optimiser step, however it is cut into micro-batches and spread
    over processes. The order of the data and the choice of noisy states depend on seed, epoch and
    row alone, so a resumed run goes on as if it had not been interrupted.

    Args:
        model: a transformers or PEFT model, or what ``from_pretrained`` takes.
        args: settings; ``args.lora_r`` or ``args.lora_from`` puts adapters on a model that
            has none.
        train_dataset: trajectories, or the folder or folders that `cllm collect` wrote.
        processing_class: the tokenizer. It must be the one of the trajectories.
        eval_prompts: held-out prompts (`Prompt`, text or token ids), decoded every
            ``args.eval_steps`` and at the end: speed, and quality against the bound. The best
            model inside the bound is kept in ``<output_dir>/best_checkpoint``.
        base_model: judges the quality; None: the model as it is handed in (a copy; with adapters
            the model without them).
        recipe: further settings to write into ``cllm_recipe.json`` beside the model.
        callbacks, optimizers: as for `transformers.Trainer`.

    Raises:
        ValueError: an unfit setting, data set or tokenizer.
    """

    args: ConsistencyTrainingArguments

    def __init__(
        self,
        model: Any,
        args: ConsistencyTrainingArguments,
        train_dataset: Any,
        *,
        processing_class: Any = None,
        eval_prompts: Sequence[Any] | None = None,
        base_model: Any = None,
        recipe: dict[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start one process a GPU: "
                f"torchrun --nproc-per-node {args.n_gpu} -m cllm.cli train ..."
            )
        if args.eval_strategy != "no" and not eval_prompts:
            raise ValueError("evaluation needs held-out prompts; give eval_prompts")
        if isinstance(model, (str, os.PathLike)):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model)
        if (args.lora_r or args.lora_from) and not is_peft(model):
            set_seed(args.seed)  # adapters start at random
            model = add_adapters(model, args)
        if args.gated and not is_peft(model):
            raise ValueError(
                "gated=True trains LoRA adapters; set lora_r or lora_from, or hand in a PEFT model"
            )
        dataset = trajectories(train_dataset, processing_class)
        self.examples = training_examples(dataset, args, end_tokens(model))
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=self.examples,
            # transformers asks for one before it evaluates; `evaluate` reads `held_out`
            eval_dataset=list(eval_prompts) if eval_prompts else None,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), StepHooks(self)],
            optimizers=optimizers,
        )
        if args.fsdp and args.world_size > 1 and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp was asked for, but accelerate does not shard a model on {args.device.type}; "
                "leave fsdp out"
            )
        if args.gated and self.is_fsdp_enabled:
            raise ValueError(
                "gated training keeps the adapters whole, to decode with them; leave fsdp out"
            )
        # `compute_loss` divides by the counts of the whole step: nothing else may divide again
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.trajectories = dataset
        self.recipe = dict(recipe or {})
        self.meter = Meter()
        self.watch = QualityWatch(
            args.quality_bound(), args.quality_patience if args.stop_on_quality else None
        )
        self.stopped_because: list[str] | None = None
        self.last_verdict: Verdict | None = None
        self._collator = collator(args, processing_class, model)
        self._handle: TrainingHandle | None = None
        self._base_weights: dict[str, Tensor] | None = None
        self._step_batches: list[tuple[Any, Tensor]] = []
        self._batches_in_step = 0
        self._guesses: HostCopy | None = None
        self._lora_layers = lora_layers(self.model, args)
        self.held_out: HeldOut | None = None
        if eval_prompts:
            self.held_out = HeldOut(
                self.model,
                processing_class,
                eval_prompts,
                args,
                base_model,
                dataset,
                sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
            )

    # -- data -----------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        shuffle = getattr(self.args, "train_sampling_strategy", "random") == "random"
        return EpochOrder(len(self.trajectories), data_seed(self.args), shuffle=shuffle)

    def _collate(self, items: Any) -> dict[str, Any]:
        batch = self._collator(items)
        # counted here, on the host, so that nothing waits for the device
        counts = Counts.of(batch)
        del batch["nominal_tokens"]
        return {**batch, "counts": counts}

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimiser step, each told the counts of the whole step."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        local = sum((batch.pop("counts") for batch in batches), Counts())
        numbers = torch.tensor(local.numbers(), dtype=torch.float32, device=self.args.device)
        counts = Counts(*self.accelerator.reduce(numbers, "sum").tolist())
        for batch in batches:
            batch["totals"] = (counts.rows, counts.labels)
        self.meter.step(counts)
        self._step_batches, self._batches_in_step = [], len(batches)
        return batches, torch.tensor(counts.labels)

    # -- the step -------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one micro-batch: its share of the loss of the whole step."""
        with without_input_casts(self._lora_layers):
            outputs = model(**inputs)
        if outputs.guesses is not None:
            self._guesses = HostCopy(inputs["row_numbers"], outputs.guesses)
        # a process has its share of the sum, and gradients and logs are averaged over processes
        processes = self.accelerator.num_processes
        self.meter.add(
            consistency_loss=outputs.consistency_loss * processes,
            ar_loss=outputs.ar_loss * processes,
        )
        loss = outputs.loss * processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; visited windows move on by its guesses.

        Raises:
            NonFiniteLossError: after the step's last micro-batch, before the weights change.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        # not in `compute_loss`, where a GPU would wait for its backward pass
        if self._guesses is not None:
            self.examples.advance(*self._guesses.wait())
            self._guesses = None
        self._step_batches.append((inputs, loss))
        if len(self._step_batches) == self._batches_in_step:
            batches, self._step_batches = self._step_batches, []
            check_finite(self, batches)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the two losses, the noisy tokens so far and the speed to a training log."""
        if "loss" in logs:
            logs.update(self.meter.read(self.accelerator))
            windows = self.examples.windows
            visited = None if windows is None else windows.tokens_per_forward()
            if visited is not None:
                logs["visited_tokens_per_forward"] = visited
        super().log(logs, start_time)

    # -- the run --------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train; with True or a folder, go on from a checkpoint.

        Raises:
            CheckpointError: if there is no whole checkpoint there, or one of a finished run.
            NonFiniteLossError: the loss became infinite or NaN.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.output_folder)
        if checkpoint is not None:
            check_steps_left(checkpoint, self.args.max_steps)
        if self.args.should_save:
            recover_folder(self.best_folder)
        self._handle = patch_training(self.model, self.args.consistency_config())
        if self.args.teacher == "base":
            # a second run of this trainer has the same base model as the first
            if self._base_weights is None:
                self._base_weights = self._handle.teacher_state_dict()
            self._handle.load_teacher_state_dict(self._base_weights)
        try:
            if checkpoint is not None:
                self._restore(checkpoint)
            if self.held_out is not None:
                # before the first step, while the weights are still the base model's
                self.held_out.prepare(self)
            self.meter.restart()
            where = None if checkpoint is None else str(checkpoint)
            return super().train(where, *args, **kwargs)
        finally:
            self._handle.remove()
            self._handle = None
            self._step_batches = []
            self.is_in_train = False

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Decode the held-out prompts; see `cllm.evaluation.Evaluation` for the metrics.

        In training, also judges them: keeps the model if it is the best inside the bound, and ends
        the training if quality has been outside for too long.

        Raises:
            ValueError: if there are no held-out prompts.
        """
        if self.held_out is None:
            raise ValueError("evaluation needs held-out prompts; give eval_prompts")
        with self.meter.paused():
            result = self.held_out.measure(self)
            metrics = result.metrics()
            metrics["noisy_tokens"] = self.meter.total.nominal
            if self.base_evaluation is not None:
                metrics["base_tokens_per_forward"] = self.base_evaluation.tokens_per_forward
            verdict = self._judge(metrics)
            named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
            self.log(named)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, named
            )
            if verdict is not None:
                self._act_on(verdict, metrics)
        return named

    @property
    def base_evaluation(self) -> Evaluation | None:
        """What the base model does on the held-out prompts; None before it was measured."""
        return None if self.held_out is None else self.held_out.base_result

    def _judge(self, metrics: dict[str, float]) -> Verdict | None:
        if not self.is_in_train:
            violations = self.watch.bound.violations(metrics)
            metrics["inside_bound"] = float(not violations)
            return None
        verdict = self.watch.judge(self.state.global_step, metrics)
        self.last_verdict = verdict
        metrics["inside_bound"] = float(verdict.inside)
        metrics["is_best"] = float(verdict.best)
        return verdict

    def _act_on(self, verdict: Verdict, metrics: dict[str, float]) -> None:
        if verdict.best:
            self._save_best(metrics)
        if verdict.stop:
            self.stopped_because = verdict.violations
            self.control.should_training_stop = True
            logger.warning(
                f"stopping at step {self.state.global_step}: quality left its bound "
                f"{self.watch.outside} evaluations in a row ({'; '.join(verdict.violations)})"
            )

    def update_teacher(self) -> None:
        """After an optimiser step that took place."""
        if self._handle is not None and not self.accelerator.optimizer_step_was_skipped:
            self._handle.update_teacher()

    def gather_windows(self) -> None:
        """Let every process have the windows of visited states that the others moved."""
        if self.examples.windows is not None:
            self.examples.windows.gather(self.accelerator)

    # -- saving ---------------------------------------------------------------------------------

    @property
    def output_folder(self) -> Path:
        """Where checkpoints and models go."""
        # transformers fills the argument in where it is not given
        return Path(str(self.args.output_dir))

    @property
    def best_folder(self) -> Path:
        """Where the best model inside the quality bound is, once there is one."""
        return self.output_folder / BEST

    def _save_best(self, metrics: dict[str, float]) -> None:
        if not self.args.should_save:
            # takes part in gathering the weights, where they are sharded
            self._export(str(self.best_folder) + ".part")
            self.accelerator.wait_for_everyone()
            return
        with replaced_folder(self.best_folder) as folder:
            self._export(str(folder))
            write_json(folder / "metrics.json", {"step": self.state.global_step, **metrics})
        self.accelerator.wait_for_everyone()

    def _export(self, folder: str) -> None:
        """Save a model for use: merged, if that was asked for."""
        if not self.args.merge_lora:
            super().save_model(folder, _internal_call=True)
        elif self.args.should_save:
            merged(self.accelerator.unwrap_model(self.model)).save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            save_descriptions(self, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A folder that plain transformers loads (PEFT for adapters), with tokenizer, generation
        config and ``cllm_recipe.json``; adapters are merged where ``args.merge_lora`` says so.
        Gated adapters have ``cllm_adapter.json`` too: ``cllm.generate(base, adapter=folder)``."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        else:
            self._export(output_dir if output_dir is not None else str(self.output_folder))
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_descriptions(self, output_dir or str(self.output_folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # ours first: transformers writes the file that marks a checkpoint as whole
        with self.meter.paused():
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            self.gather_windows()
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                state: dict[str, Any] = {"meter": self.meter.state(), "quality": self.watch.state()}
                if self.held_out is not None:
                    state["base"] = self.held_out.state()
                write_json(folder / STATE_FILE, state)
                if self.examples.windows is not None:
                    torch.save(self.examples.windows.state(), folder / _WINDOWS_FILE)
                # the base model is the one that training was started from, again
                if self.args.teacher == "ema" and self._handle is not None:
                    torch.save(self._handle.teacher_state_dict(), folder / _TEACHER_FILE)
            super()._save_checkpoint(model, trial)

    def _restore(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self.meter.restore(state["meter"])
        self.watch.restore(state["quality"])
        if self.held_out is not None:
            self.held_out.restore(state.get("base"))
        if self.examples.windows is not None:
            self.examples.windows.restore(read_tensors(checkpoint, _WINDOWS_FILE, "sampling"))
        if self.args.teacher == "ema":
            assert self._handle is not None
            self._handle.load_teacher_state_dict(read_tensors(checkpoint, _TEACHER_FILE, "teacher"))
