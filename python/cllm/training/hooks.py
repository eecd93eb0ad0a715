"""What `ConsistencyTrainer` does between transformers' own steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import ConsistencyTrainer


class StepHooks(TrainerCallback):
    """Moves the averaged teacher after each optimiser step, evaluates after the last one, and
    shares between processes what each has moved in an epoch."""

    def __init__(self, trainer: ConsistencyTrainer):
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.gather_windows()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.update_teacher()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= state.max_steps and self._trainer.held_out is not None:
            control.should_evaluate = True
        return control
