"""A loss that is not finite ends the run before the weights change, its batch saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; the message says where the batch lies."""


def check_finite(trainer: Any, batches: Sequence[tuple[dict[str, Any], Tensor]]) -> None:
    """Look at the losses of an optimiser step, one readback for all of them.

    Args:
        trainer: the `transformers.Trainer` that runs.
        batches: (inputs, loss []) of each of this process's micro-batches.

    Raises:
        NonFiniteLossError: in every process, if the loss of any is not finite. The inputs are then
            in ``nan_batch.pt`` (of several processes: ``nan_batch_<process>.pt``) in the output
            folder.
    """
    losses = torch.stack([loss for _, loss in batches])
    bad = ~losses.isfinite()
    if not trainer.accelerator.reduce(bad.any().float(), "sum"):
        return
    step = trainer.state.global_step + 1
    where = " in another process"
    if bad.any():
        path = _save(trainer, step, batches, bad.tolist())
        where = f"; the batch is in {path}"
    shown = ", ".join(f"{loss:g}" for loss in losses.tolist())
    raise NonFiniteLossError(
        f"the loss of step {step} is not finite ({shown}){where}; lower the learning rate, or "
        "train in float32 or bfloat16"
    )


def _save(
    trainer: Any, step: int, batches: Sequence[tuple[dict[str, Any], Tensor]], bad: list[bool]
) -> Path:
    process = f"_{trainer.args.process_index}" if trainer.args.world_size > 1 else ""
    path = Path(trainer.args.output_dir) / f"nan_batch{process}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "batches": [
            _on_host(inputs) for (inputs, _), lost in zip(batches, bad, strict=True) if lost
        ],
        "losses": [float(loss) for _, loss in batches],
        "step": step,
        "epoch": trainer.state.epoch,
    }
    torch.save(content, path)
    return path


def _on_host(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
