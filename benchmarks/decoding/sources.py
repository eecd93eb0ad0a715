"""What every source of guesses is worth: tokens per forward on held-out prompts, one switch after
the other.

Counted in fp32, where every text is greedy search's, so that nothing here hangs on the machine.
What the rows cost is the clock's matter (`compare.py`).

    python benchmarks/decoding/sources.py --tasks recipes/adapter_held_out.yaml \
        --adapter ADAPTER --work runs/sources --record cpu
    python benchmarks/decoding/sources_report.py
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import cllm
from benchmarks.harness import load, provenance, write_record
from benchmarks.tasks import read_tasks, token_caps
from cllm.bench.tasks import Kept, code_digest, weights_digest
from cllm.evaluation import decode_texts

# name -> changes to the settings, and whether an adapter guesses
SOURCES: dict[str, tuple[dict[str, Any], bool]] = {
    "predictions left over": ({"lookup": 0, "pool": False}, False),
    "looked up": ({"pool": False}, False),
    "pool": ({"lookup": 0, "pool": True}, False),
    "looked up, pool, in order": ({"guesses": "ordered"}, False),
    "looked up, pool": ({}, False),
    "looked up, pool, 2 candidates, in order": ({"guesses": "ordered", "candidates": 2}, False),
    "looked up, pool, 2 candidates": ({"candidates": 2}, False),
    "looked up, pool, 4 candidates": ({"candidates": 4}, False),
    "adapter": ({"lookup": 0}, True),
    "adapter, looked up, in order": ({"guesses": "ordered"}, True),
    "adapter, looked up": ({}, True),
    "adapter and looked up, pool, 2 candidates": ({"candidates": 2}, True),
    "adapter and looked up, pool, 4 candidates": ({"candidates": 4}, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder or hub id; by default the demo's model")
    parser.add_argument("--adapter", help="gated adapter of the base")
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--data", action="append", default=[], metavar="TASK=FILE")
    parser.add_argument("--limit", type=int, default=16, help="prompts of a task")
    parser.add_argument("--max-new-tokens", action="append", metavar="[TASK=]N")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--work", type=Path, required=True, help="keeps what is finished")
    parser.add_argument("--record", metavar="FOLDER", help="folder in benchmarks/results/")
    parser.add_argument("--name", default="guess_sources", help="of the record")
    options = parser.parse_args()
    model, tokenizer = load(options.base, "float32", "cpu")
    adapter = None if options.adapter is None else cllm.GatedAdapter.load(options.adapter)
    sources = dict(entry.split("=", 1) for entry in options.data)
    caps = token_caps(options.max_new_tokens)
    tasks = read_tasks(options.tasks, sources, model, tokenizer, caps)
    kept, digest = Kept(options.work), weights_digest(model)
    plain = cllm.JacobiConfig(block_size=options.block_size)
    found: dict[str, Any] = {}
    for task in tasks:
        prompts = task.prompts[: options.limit]
        rows: dict[str, Any] = {}
        expected: list[list[int]] | None = None
        for name, (changes, gated) in SOURCES.items():
            if gated and adapter is None:
                continue
            config = replace(plain, **changes)
            used = adapter if gated else None

            def decode(
                config: Any = config, used: Any = used, prompts: Any = prompts, task: Any = task
            ) -> Any:
                texts = decode_texts(
                    model, tokenizer, prompts, config=config, max_new_tokens=task.max_new_tokens,
                    batch_size=options.batch_size, adapter=used,
                )  # fmt: skip
                return [[text.tokens, text.forwards] for text in texts]

            key = [digest, code_digest(), prompts, task.max_new_tokens, asdict(config)]
            key.append(None if used is None else used.metadata)
            decoded = kept.get(f"{task.name}-{name.replace(' ', '-')}", key, decode)
            texts = [text for text, _ in decoded]
            expected = expected or texts
            rows[name] = {
                "tokens_per_forward": sum(map(len, texts)) / sum(count for _, count in decoded),
                "same": sum(a == b for a, b in zip(texts, expected, strict=True)),
            }
            print(f"{task.name}, {name}: {rows[name]['tokens_per_forward']:.3f}", flush=True)
        found[task.name] = {
            "prompts": len(prompts), "max_new_tokens": task.max_new_tokens, "sources": rows,
        }  # fmt: skip
    record = {
        "provenance": provenance("cpu"),
        "model": options.base or "SmolLM2-135M-Instruct",
        "block_size": options.block_size,
        "tasks": found,
    }
    if options.record:
        print(write_record(record, options.record, options.name))
    else:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
