"""Jacobi decoding gives greedy search's tokens: every family, width, mode and fill."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cllm

from .tiny_models import CONFIGS, prompts, tiny_model

MODES = ["sliding", "block"]
FILLS = ["prompt", "last", "random", "pad"]


def greedy(model, inputs, **kwargs):
    return model.generate(**inputs, do_sample=False, **kwargs)


@pytest.mark.parametrize("family", CONFIGS)
def test_equals_huggingface_greedy(family):
    model = tiny_model(family)
    inputs = prompts([9, 5, 1])
    expected = greedy(model, inputs, max_new_tokens=36)
    for block_size in (1, 5, 16, 64):
        for mode in MODES:
            found = cllm.generate(
                model,
                **inputs,
                max_new_tokens=36,
                block_size=block_size,
                mode=mode,
                do_sample=False,
            )
            assert torch.equal(found, expected), (block_size, mode)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_every_fill(family, fill):
    model = tiny_model(family)
    inputs = prompts([7, 3])
    expected = greedy(model, inputs, max_new_tokens=30)
    for block_size in (2, 8, 33):
        for mode in MODES:
            found = cllm.generate(
                model,
                **inputs,
                max_new_tokens=30,
                block_size=block_size,
                fill=fill,
                mode=mode,
                seed=7,
            )
            assert torch.equal(found, expected), (block_size, mode)


@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    new_tokens=st.integers(1, 40),
    block_size=st.integers(1, 64),
    mode=st.sampled_from(MODES),
    fill=st.sampled_from(FILLS),
    accept=st.sampled_from(["all", "one"]),
    seed=st.integers(0, 1000),
)
def test_any_prompt_length_padding_and_width(
    lengths, new_tokens, block_size, mode, fill, accept, seed
):
    model = tiny_model("qwen3")
    inputs = prompts(lengths, seed)
    expected = greedy(model, inputs, max_new_tokens=new_tokens)
    output = cllm.generate(
        model,
        **inputs,
        max_new_tokens=new_tokens,
        block_size=block_size,
        mode=mode,
        fill=fill,
        accept=accept,
        seed=seed,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, expected)
    assert bool((output.iterations <= output.accepted).all())
    assert output.forwards == int(output.iterations.max())


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_a_row_does_not_depend_on_its_neighbours(family):
    model = tiny_model(family)
    batch = prompts([11, 2, 6, 1])
    together = cllm.generate(
        model, **batch, max_new_tokens=32, block_size=8, return_dict_in_generate=True
    )
    for row in range(4):
        kept = batch["attention_mask"][row].bool()
        alone = cllm.generate(
            model,
            input_ids=batch["input_ids"][row : row + 1, kept],
            max_new_tokens=32,
            block_size=8,
            return_dict_in_generate=True,
        )
        length = int(alone.accepted[0])
        assert int(together.accepted[row]) == length
        assert int(together.iterations[row]) == int(alone.iterations[0])
        found = together.sequences[row, 11 : 11 + length]
        assert torch.equal(found, alone.sequences[0, int(kept.sum()) :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_half_precision_is_one_fixed_point(family, dtype):
    """A row's bits depend on its own prefix only, so every trajectory ends in the same text."""
    if family == "llama":
        torch.set_num_threads(2)  # nor may a row's bits depend on how threads share the rows
    model = tiny_model(family, dtype)
    inputs = prompts([23])
    one = cllm.generate(model, **inputs, max_new_tokens=48, block_size=16, accept="one")
    for changes in (
        {},
        {"mode": "block"},
        {"fill": "random", "seed": 1},
        {"fill": "random", "seed": 2, "mode": "block"},
        {"fill": "last"},
        {"fill": "pad", "accept": "one"},
    ):
        found = cllm.generate(model, **inputs, max_new_tokens=48, block_size=16, **changes)
        assert torch.equal(found, one), changes


def test_half_precision_past_the_first_attention_block():
    """Beyond 512 slots the view grows, in whole blocks of attention's sum."""
    model = tiny_model("qwen2", torch.bfloat16)
    inputs = prompts([150], seed=3)
    runs = [
        cllm.generate(
            model,
            **inputs,
            max_new_tokens=480,
            block_size=16,
            eos_token_id=None,
            fill=fill,
            mode=mode,
            accept=accept,
        )
        for fill, mode, accept in (
            ("prompt", "sliding", "one"),
            ("prompt", "sliding", "all"),
            ("random", "block", "all"),
        )
    ]
    assert runs[0].shape == (1, 630)
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_growing_past_the_first_cache_equals_huggingface():
    model = tiny_model("llama")
    inputs = prompts([100, 3], seed=4)
    expected = greedy(model, inputs, max_new_tokens=560, eos_token_id=None)
    found = cllm.generate(model, **inputs, max_new_tokens=560, eos_token_id=None, block_size=32)
    assert torch.equal(found, expected)


def test_learned_positions_up_to_the_last():
    """Guesses beyond the last position of GPT-2 must not ask for an embedding it does not have."""
    model = tiny_model("gpt2")
    inputs = prompts([200])
    expected = greedy(model, inputs, max_new_tokens=56, eos_token_id=None)
    found = cllm.generate(model, **inputs, max_new_tokens=56, eos_token_id=None, block_size=64)
    assert torch.equal(found, expected)
    assert found.shape[1] == 256


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import copy

    model = copy.deepcopy(tiny_model("llama", dtype)).cuda()
    inputs = {name: tensor.cuda() for name, tensor in prompts([9, 5, 1]).items()}
    one = cllm.generate(model, **inputs, max_new_tokens=100, accept="one")
    for changes in ({}, {"mode": "block"}, {"fill": "random"}):
        assert torch.equal(cllm.generate(model, **inputs, max_new_tokens=100, **changes), one)
    if dtype == torch.float32:
        assert torch.equal(one, greedy(model, inputs, max_new_tokens=100))
