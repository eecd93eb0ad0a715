"""What is a trained consistency LLM worth on prompts it never saw, and what did it cost in quality?

Every model decodes the held-out prompts of every task by Jacobi iteration. Its text is judged by
the base model (negative log-likelihood), by itself (repetition), by the base's own text (agreement)
and by the reference answers where there are any. Then all of them, and HuggingFace's greedy search,
decode some of the prompts one by one, in turn, against the clock.

    python benchmarks/training/held_out.py --tasks recipes/held_out.yaml \
        --model "self, AR 10=runs/self-10/best_checkpoint" --work runs/held-out --record cpu

What is done is kept in the folder --work, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cllm
from cllm.answers import answer_accuracy
from cllm.bench.tasks import Kept, Task, weights_digest
from cllm.evaluation import DecodedText, decode_texts, negative_log_likelihoods, summarise

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import load, provenance, spread, write_record
from benchmarks.tasks import read_tasks, token_caps

BASE = "base"


def trained(folder: str, base: Any) -> Any:
    """The model in `folder`: a whole one, or adapters that are merged into a copy of the base."""
    if (Path(folder) / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload().eval()
    return load(folder, "float32", "cpu")[0]


def decoded(
    model: Any, base: Any, tokenizer: Any, task: Task, options: argparse.Namespace
) -> dict[str, Any]:
    """Texts of all prompts of a task and what the base thinks of them, JSON-serialisable."""
    start = time.perf_counter()
    texts = decode_texts(
        model, tokenizer, task.prompts,
        config=cllm.JacobiConfig(block_size=options.block_size, lookup=0),
        max_new_tokens=task.max_new_tokens, batch_size=options.batch_size,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    responses = [text.tokens for text in texts]
    return {
        "seconds": seconds,
        "texts": [vars(text) for text in texts],
        "nll": negative_log_likelihoods(base, task.prompts, responses, options.batch_size),
    }


def quality(
    tokenizer: Any, task: Task, mine: dict[str, Any], reference: dict[str, Any]
) -> dict[str, Any]:
    """Speed and quality of one model's texts beside the base's."""
    texts = [DecodedText(**text) for text in mine["texts"]]
    references = [text["tokens"] for text in reference["texts"]]
    found = summarise(texts, references, mine["nll"], reference["nll"], mine["seconds"]).metrics()
    if task.answers is not None:
        written = [tokenizer.decode(text.tokens, skip_special_tokens=True) for text in texts]
        found["answer_accuracy"] = answer_accuracy(written, task.answers)
    return found


def speeds(
    models: dict[str, Any], tokenizer: Any, task: Task, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of every contender, prompt by prompt in turn."""
    contenders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    settings: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "do_sample": False}

    def huggingface(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    def jacobi(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: cllm.generate(
            model, ids, attention_mask=torch.ones_like(ids),
            block_size=options.speed_block_size, **settings,
        )  # fmt: skip

    for name, model in models.items():
        contenders[f"HuggingFace greedy, {name}"] = huggingface(model)
        contenders[f"Jacobi, {name}"] = jacobi(model)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    prompts = task.prompts[: options.speed_prompts]
    for number, prompt in enumerate([prompts[0], *prompts]):
        for name, run in contenders.items():
            start = time.perf_counter()
            tokens = run(torch.tensor([prompt])).shape[1] - len(prompt)
            if number:  # the first one warms up
                rates[name].append(tokens / (time.perf_counter() - start))
    first = rates[f"HuggingFace greedy, {BASE}"]
    return {
        name: {
            "tokens_per_second": spread(values),
            "ratio_to_huggingface_base": spread(
                [a / b for a, b in zip(values, first, strict=True)]
            ),
        }
        for name, values in rates.items()
    }


def about(folder: str) -> dict[str, Any]:
    """What the folder says of how the model was trained."""
    path = Path(folder) / "cllm_recipe.json"
    if not path.exists():
        return {}
    recipe = json.loads(path.read_text())
    names = ("teacher", "ar_weight", "learning_rate", "lora_r", "consistency", "divergence")
    return {
        **{name: recipe["arguments"].get(name) for name in names},
        "step": recipe["step"],
        "trained": recipe["trained"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder or hub id; by default the demo's model")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--tasks", type=Path, required=True, help="YAML, see recipes/held_out.yaml")
    parser.add_argument("--data", action="append", default=[], metavar="TASK=FILE")
    parser.add_argument("--task", action="append", help="only this one; may be given again")
    parser.add_argument(
        "--max-new-tokens", action="append", metavar="[TASK=]N",
        help="at most so many, where a task has more; may be given again",
    )  # fmt: skip
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--speed-prompts", type=int, default=12, help="prompts against the clock")
    parser.add_argument("--speed-block-size", type=int, default=8, help="n against the clock")
    parser.add_argument("--work", type=Path, required=True, help="keeps what is finished")
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    parser.add_argument("--name", default="cllm_held_out", help="the record's name")
    options = parser.parse_args()
    folders = dict(entry.rsplit("=", 1) for entry in options.model)

    base, tokenizer = load(options.base, "float32", "cpu")
    tokenizer.padding_side = "left"
    models = {BASE: base, **{name: trained(folder, base) for name, folder in folders.items()}}
    sources = dict(entry.split("=", 1) for entry in options.data)
    tasks = read_tasks(options.tasks, sources, base, tokenizer, token_caps(options.max_new_tokens))
    if options.task:
        tasks = [task for task in tasks if task.name in options.task]
    kept = Kept(options.work)
    results: dict[str, Any] = {}
    for task in tasks:
        rows: dict[str, Any] = {}
        texts: dict[str, Any] = {}
        for name, model in models.items():
            key = [
                weights_digest(base), weights_digest(model), task.prompts, task.max_new_tokens,
                options.block_size,
            ]  # fmt: skip
            texts[name] = kept.get(
                f"texts-{task.name}",
                key,
                lambda model=model, task=task: decoded(model, base, tokenizer, task, options),
            )
            rows[name] = quality(tokenizer, task, texts[name], texts[BASE])
            print(f"{task.name}, {name}: {rows[name]['tokens_per_forward']:.3f} tokens a forward")
        results[task.name] = {
            "prompts": len(task.prompts),
            "max_new_tokens": task.max_new_tokens,
            "models": rows,
            "speed": speeds(models, tokenizer, task, options) if options.speed_prompts else None,
        }
    record = {
        "provenance": provenance("cpu"),
        "base": options.base or "SmolLM2-135M-Instruct",
        "block_size": options.block_size,
        "speed_block_size": options.speed_block_size,
        "models": {name: about(folder) for name, folder in folders.items()},
        "tasks": results,
    }
    if options.record:
        write_record(record, options.record, options.name)
    else:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
