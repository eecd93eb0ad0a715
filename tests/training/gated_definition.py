"""Gated consistency training written out with separate forwards: the base model reads the clean
text before a noisy segment into a cache, and the adapted model reads the segment against it."""

from __future__ import annotations

import inspect
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import DynamicCache

from cllm import ConsistencyConfig
from cllm.training.sampling import SampledExample
from cllm.traits import cache_argument

from .definition import divergence, logits_of

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def adapted(model: Any, family: str = "llama", scale: float = 0.3, **settings: Any) -> Any:
    """A PEFT model whose adapters do something."""
    settings = {"target_modules": TARGETS.get(family, TARGETS["llama"]), "r": 4} | settings
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a fresh adapter does nothing
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale, generator=generator)
    return wrapped


def gated_logits(wrapped: Any, clean: list[int], noisy: list[int]) -> Tensor:
    """[len(noisy), V]: `clean` by the base model, `noisy` by base and adapter on its cache."""
    model = wrapped.get_base_model()
    cache = DynamicCache()
    name = cache_argument(inspect.signature(type(model).forward).parameters)
    if clean:
        with torch.no_grad(), wrapped.disable_adapter():
            model(input_ids=torch.tensor([clean]), use_cache=True, **{name: cache})
    positions = torch.arange(len(clean), len(clean) + len(noisy))
    return model(
        input_ids=torch.tensor([noisy]),
        position_ids=positions[None],
        use_cache=True,
        **{name: cache},
    ).logits[0]


def defined_gated_loss(
    wrapped: Any, samples: list[SampledExample], config: ConsistencyConfig
) -> tuple[Tensor, int]:
    """(mean over the counted rows, their number)."""
    total, rows = torch.zeros((), dtype=wrapped.dtype), 0
    for sample in samples:
        example = sample.example
        text = example.prompt + example.response
        with torch.no_grad(), wrapped.disable_adapter():
            taught = logits_of(wrapped, text)
        for entry, number in sample.picks:
            block = example.blocks[entry]
            state, right = block.states[number], block.fixed_point
            start = len(example.prompt) + example.block_start(entry)
            # the last right token and all behind it are the adapter's
            wrong = next(i for i in range(len(state) + 1) if state[:i] != right[:i]) - 1
            first = start + wrong
            # a whole window goes on with what stands in the next block
            window = (entry, number) in sample.tails
            tail = sample.tails.get((entry, number))
            following = [] if tail is None else example.blocks[entry + 1].states[tail]
            noisy = [text[first - 1], *state[wrong:], *following]
            if window:
                noisy = noisy[: example.block_size]
            student = gated_logits(wrapped, text[: first - 1], noisy)
            # row i predicts token i + 1, which the block, or the text of a window, must have
            end = min(first + len(noisy) - 1, len(text) - 1) if window else start + len(state) - 1
            counted = list(range(first, end))
            losses = divergence(student[1 : 1 + len(counted)], taught[counted], config)
            total, rows = total + losses.sum(), rows + len(counted)
    return total / max(rows, 1), rows
