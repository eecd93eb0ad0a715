"""One process of a distributed run: ``python -m tests.training.distributed_run TRAJECTORIES OUT``.

Writes the losses of every step, the norm of the trained weights, and the last evaluation to
``OUT/result.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .leaving import leave
from .runs import EVAL_PROMPTS, losses, tiny_trainer


def main(trajectories: str, output: str, settings: str) -> None:
    given: dict[str, Any] = json.loads(settings)
    prompts = EVAL_PROMPTS if given.get("eval_strategy") else None
    trainer = tiny_trainer(Path(trajectories), Path(output), prompts=prompts, **given)
    trainer.train()
    trainer.save_model(output)
    if trainer.args.process_index == 0:
        history = trainer.state.log_history
        evaluations = [entry for entry in history if "eval_tokens_per_forward" in entry]
        result = {
            "processes": trainer.accelerator.num_processes,
            "losses": losses(trainer),
            "trained": trainer.meter.state(),
            "evaluations": evaluations,
        }
        (Path(output) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
