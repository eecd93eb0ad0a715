"""Figure 7 of CLLM (arXiv 2403.00835): one held-out prompt, iteration by iteration, by two models.

    python benchmarks/training/side_by_side.py --tasks recipes/held_out.yaml --task gsm8k \
        --model runs/smollm2_cpu/best_checkpoint --output docs/trajectory_base_cllm.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import cllm
from cllm.report import write_png

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from harness import load
from held_out import read_tasks, trained


def trajectory(model: Any, tokenizer: Any, prompt: list[int], options: argparse.Namespace) -> Any:
    """How `model` decodes the prompt's continuation."""
    ids = torch.tensor([prompt])
    output = cllm.generate(
        model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.max_new_tokens,
        block_size=options.block_size, mode=options.mode, record_trajectories=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return output.trajectories[0].with_pieces(tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder or hub id; by default the demo's model")
    parser.add_argument("--model", required=True, help="folder of the consistency LLM")
    parser.add_argument("--tasks", type=Path, required=True, help="YAML, see recipes/held_out.yaml")
    parser.add_argument("--data", action="append", default=[], metavar="TASK=FILE")
    parser.add_argument("--task", required=True, help="one of them")
    parser.add_argument("--prompt", type=int, default=0, help="which of its prompts, from 0")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--mode", default="block", choices=("block", "sliding"))
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, required=True, help="PNG to draw")
    options = parser.parse_args()

    base, tokenizer = load(options.base, "float32", "cpu")
    sources = dict(entry.split("=", 1) for entry in options.data)
    tasks = {task.name: task for task in read_tasks(options.tasks, sources, base, tokenizer)}
    if options.task not in tasks:
        raise SystemExit(f"{options.tasks} has no task {options.task}, but {', '.join(tasks)}")
    prompt = tasks[options.task].prompts[options.prompt]
    models = {"Base model": base, "Consistency LLM": trained(options.model, base)}
    found = [trajectory(model, tokenizer, prompt, options) for model in models.values()]
    print(write_png(found, options.output, titles=list(models)))


if __name__ == "__main__":
    main()
