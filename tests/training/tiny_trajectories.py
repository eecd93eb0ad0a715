"""Trajectories of a tiny model, made with the library's own collection, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cllm.training.examples import BlockStates, TrainingExample
from cllm.training.manifest import Manifest, tokenizer_hash
from cllm.training.store import write_shard
from tests.decoding.tiny_models import EOS, VOCAB

BLOCK = 8


@torch.no_grad()
def jacobi_states(model: Any, prefix: list[int], guess: list[int]) -> list[list[int]]:
    """States of one block from `guess` to its fixed point, one plain forward a state."""
    states, state = [], guess
    while not states or state != states[-1]:
        states.append(state)
        ids = torch.tensor([prefix + state], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        state = logits[len(prefix) - 1 : -1].argmax(dim=-1).tolist()
    return states


def examples(model: Any, count: int, length: int = 24, seed: int = 0) -> list[TrainingExample]:
    """`count` random prompts, the model's greedy responses and their trajectories."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        size = int(torch.randint(4, 10, (), generator=generator))
        prompt = torch.randint(3, VOCAB, (size,), generator=generator).tolist()
        response: list[int] = []
        blocks = []
        while len(response) < length and EOS not in response:
            guess = [prompt[int(i)] for i in torch.randint(size, (BLOCK,), generator=generator)]
            states = jacobi_states(model, prompt + response, guess)
            end = states[-1].index(EOS) + 1 if EOS in states[-1] else BLOCK
            blocks.append(BlockStates(_distinct([state[:end] for state in states])))
            response += states[-1][:end]
        found.append(
            TrainingExample(
                id=str(number),
                prompt=prompt,
                response=response,
                block_size=BLOCK,
                blocks=blocks,
                block_index=list(range(len(blocks))),
            )
        )
    return found


def _distinct(states: list[list[int]]) -> list[list[int]]:
    return [state for i, state in enumerate(states) if i == 0 or state != states[i - 1]]


def store(folder: Path, model: Any, tokenizer: Any, count: int = 8, seed: int = 0) -> Path:
    """A folder as `cllm collect` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    shard = write_shard(folder / "part-00000.parquet", examples(model, count, seed=seed))
    Manifest(
        model="tiny",
        revision=None,
        tokenizer_hash=tokenizer_hash(tokenizer),
        block_size=BLOCK,
        fill="prompt",
        seed=seed,
        shards=[shard],
    ).save(folder)
    return folder
