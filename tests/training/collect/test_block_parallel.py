"""Collecting all blocks at once gives the sequential definition's states, and what decoding does."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cllm
from cllm.training.collect.block_parallel import collect_states, sample_blocks

from ...decoding.tiny_models import PAD, VOCAB, fresh_model, prompts, tiny_model
from .definition import block_states, greedy, guesses

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "mistral"]


@cache
def response_of(family: str, prompt: tuple[int, ...], tokens: int) -> list[int]:
    return greedy(tiny_model(family), list(prompt), tokens)


def texts(family, lengths, tokens, seed=0):
    """Random prompts of these lengths, and the model's responses of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    asked = [torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in lengths]
    answered = [
        response_of(family, tuple(prompt), count)
        for prompt, count in zip(asked, tokens, strict=True)
    ]
    return asked, answered


def states_of(collected):
    return [block.states for block in collected.example.blocks]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fill", ["prompt", "random", "pad"])
def test_states_are_the_definitions(family, fill):
    model = tiny_model(family)
    asked, answered = texts(family, (7, 3, 12), (23, 30, 9))
    found = collect_states(
        model, asked, answered, block_size=5, fill=fill, seed=3, pad_token_id=PAD
    )
    for entry, prompt, response in zip(found, asked, answered, strict=True):
        guess = guesses(prompt, len(response), fill, 3, VOCAB, PAD)
        assert states_of(entry) == block_states(model, prompt, response, 5, guess)
        assert entry.example.prompt == prompt and entry.example.response == response
        assert entry.mismatches == [] and entry.gaps == []
        assert max(block.iterations for block in entry.example.blocks) <= entry.forwards + 1
    # otherwise nothing was iterated, and the test says nothing
    assert sum(len(states) for entry in found for states in states_of(entry)) > 30
