"""What does training a gated adapter take, beside training the whole model to be a consistency LLM?

Both are `cllm train` on the same responses, each in a process of its own: seconds a step, noisy
tokens a second, and the most memory that the process ever held, model and libraries included. The
text of the one is the base's by construction; the other is another model.

    python benchmarks/adapter/training_cost.py --trajectories runs/responses/gsm8k \
        --work runs/training-cost --record cpu
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import provenance, write_record

NAME = "adapter_training_cost"
GATED = ["--gated", "--sampling", "visited", "--states", "24", "--ar-weight", "0"]


def kinds(rank: int) -> dict[str, list[str]]:
    return {
        f"gated adapter, rank {rank}": [*GATED, "--lora-r", str(rank)],
        "whole model": [],
        "whole model, checkpointed": ["--gradient-checkpointing"],
    }


def measured(extra: list[str], output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of `cllm train`.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "cllm.cli", "train", "--output", str(output)]
    for folder in options.trajectories:
        command += ["--trajectories", folder]
    command += ["--max-steps", str(options.steps), "--dtype", options.dtype, *extra]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    trained = json.loads((output / "cllm_recipe.json").read_text())["trained"]
    seconds = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    return {
        "steps": options.steps,
        "seconds": seconds,
        "seconds_with_start": time.perf_counter() - began,
        "noisy_tokens": trained["nominal"],
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", action="append", required=True, metavar="FOLDER")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    options = parser.parse_args()
    record = {
        "provenance": provenance("cpu"),
        "base": "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "runs": {
            name: measured(extra, options.work / str(number), options)
            for number, (name, extra) in enumerate(kinds(options.rank).items())
        },
    }
    if options.record:
        print(write_record(record, options.record, NAME))
    else:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
