"""The model that a training benchmark trains, and responses of its own to train it on."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.harness import load
from cllm import ConsistencyConfig
from cllm.prompts import encode, shipped_prompts
from cllm.training.collect.block_parallel import collect_states
from cllm.training.examples import BlockStates, TrainingExample
from cllm.training.sampling import SampledExample, StateSampler

SEED = 0
TINY_VOCABULARY = 211


def tiny_model() -> Any:
    """A random Llama of 40 thousand weights."""
    import transformers

    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=TINY_VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def model_and_prompts(
    name: str | None, tiny: bool, dtype: str, device: str, count: int
) -> tuple[Any, list[list[int]]]:
    """A model in eval mode and `count` prompts; None: the demo's model."""
    if tiny:
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(3, TINY_VOCABULARY, (count, 11), generator=generator)
        return tiny_model().to(device, getattr(torch, dtype)), ids.tolist()
    model, tokenizer = load(name, dtype, device)
    prompts = [encode(tokenizer, prompt).tolist() for prompt in shipped_prompts()[:count]]
    if len(prompts) < count:
        raise SystemExit(f"--responses: there are {len(prompts)} prompts, not {count}")
    return model, prompts


@torch.no_grad()
def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Exactly `tokens` tokens, past the end-of-text token if it comes."""
    ids = torch.tensor([prompt], device=model.device)
    text = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
        max_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return text[0, len(prompt) :].tolist()


def collect(model: Any, prompts: list[list[int]], tokens: int, n: int) -> list[TrainingExample]:
    """The model's responses of `tokens` tokens, and the trajectories of their blocks."""
    responses = [greedy(model, prompt, tokens) for prompt in prompts]
    found = collect_states(model, prompts, responses, block_size=n, seed=SEED, max_rows=4)
    return [entry.example for entry in found]


def cut(example: TrainingExample, tokens: int) -> TrainingExample:
    """The first `tokens` tokens of a response, a multiple of its block size: greedy decoding and
    each block's trajectory would have been the same."""
    if tokens % example.block_size or not 0 < tokens <= len(example.response):
        raise ValueError(
            f"tokens must be a multiple of {example.block_size} up to {len(example.response)}, "
            f"not {tokens}"
        )
    count = tokens // example.block_size
    return TrainingExample(
        example.id, example.prompt, example.response[:tokens], example.block_size,
        example.blocks[:count], example.block_index[:count],
    )  # fmt: skip


def sampled(example: TrainingExample, config: ConsistencyConfig, index: int = 0) -> SampledExample:
    """One state of every block (`ConsistencyConfig.sampling`)."""
    return SampledExample(example, StateSampler(config, SEED)(example, 0, index))


def save(examples: list[TrainingExample], path: Path) -> None:
    path.write_text(json.dumps([asdict(example) for example in examples]))


def read(path: Path) -> list[TrainingExample]:
    return [
        TrainingExample(**{**entry, "blocks": [BlockStates(**b) for b in entry["blocks"]]})
        for entry in json.loads(path.read_text())
    ]
