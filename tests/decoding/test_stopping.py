"""Stop tokens, limits, strings, time and custom criteria end a row where HuggingFace ends it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

import cllm

from .tiny_models import PAD, prompts, tiny_model
from .tokenizer import letters_tokenizer

MODES = ["sliding", "block"]


def both(model, inputs, mode="sliding", block_size=16, **kwargs):
    kwargs.setdefault("do_sample", False)
    return (
        cllm.generate(model, **inputs, block_size=block_size, mode=mode, **kwargs),
        model.generate(**inputs, **kwargs),
    )


@pytest.mark.parametrize("mode", MODES)
def test_several_stop_tokens_inside_a_run(mode):
    model = tiny_model("llama")
    inputs = prompts([6, 4, 2])
    free = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
    # tokens that really come: one of each row, at different depths
    stops = [int(free[0, 6 + 3]), int(free[1, 6 + 11]), int(free[2, 6 + 20])]
    found, expected = both(
        model, inputs, mode, max_new_tokens=40, eos_token_id=stops, pad_token_id=PAD
    )
    assert torch.equal(found, expected)
    assert found.shape[1] < 46 or bool((found == PAD).any())


def test_stop_strings_from_every_place():
    tokenizer, inputs = letters_tokenizer(), prompts([6])
    model = copy.deepcopy(tiny_model("llama"))
    free = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
    strings = [tokenizer.decode(free[0, 6 + 9 : 6 + 11])]
    settings = dict(max_new_tokens=30, do_sample=False, tokenizer=tokenizer)
    expected = model.generate(**inputs, stop_strings=strings, **settings)
    assert expected.shape[1] < 30

    given = GenerationConfig(stop_strings=strings, eos_token_id=2, pad_token_id=PAD)
    assert torch.equal(
        cllm.generate(model, **inputs, generation_config=given, **settings), expected
    )
    mask = {"attention_mask": inputs["attention_mask"]}
    found = cllm.generate(model, inputs["input_ids"], given, **mask, **settings)
    assert torch.equal(found, expected)
    model.generation_config.stop_strings = strings
    assert torch.equal(cllm.generate(model, **inputs, **settings), expected)
    given = GenerationConfig(eos_token_id=2, pad_token_id=PAD)
    assert torch.equal(
        cllm.generate(model, **inputs, generation_config=given, **settings), expected
    )
    assert model.generation_config.stop_strings == strings


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [1, 2, 15, 16, 17, 31])
def test_length_limits(mode, limit):
    model = tiny_model("qwen2")
    inputs = prompts([5, 3])
    found, expected = both(model, inputs, mode, max_new_tokens=limit)
    assert torch.equal(found, expected)
    found, expected = both(model, inputs, mode, max_length=5 + limit)
    assert torch.equal(found, expected)


def test_length_limits_of_the_models_own_generation_config():
    model = tiny_model("qwen3")
    inputs = prompts([5])
    found, expected = both(model, inputs)  # transformers' default of 20 tokens
    assert torch.equal(found, expected)
    assert found.shape[1] == 5 + 20 or int(found[0, -1]) == 2


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings(mode):
    model, tokenizer = tiny_model("llama"), letters_tokenizer()
    inputs = prompts([6])
    text = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)[0, 6:]
    )
    for start in (0, 5, 17):
        found, expected = both(
            model,
            inputs,
            mode,
            max_new_tokens=40,
            stop_strings=[text[start : start + 3]],
            tokenizer=tokenizer,
            eos_token_id=None,
        )
        assert torch.equal(found, expected), start
        assert found.shape[1] < 46


def test_stop_strings_need_the_tokenizer():
    with pytest.raises(ValueError, match="tokenizer=tokenizer"):
        cllm.generate(tiny_model("llama"), **prompts([3]), stop_strings=["x"])


class EndsIn(StoppingCriteria):
    """Stops behind a token, but only beyond a length; notes every prefix it is shown."""

    def __init__(self, token: int, beyond: int):
        self.token, self.beyond, self.seen = token, beyond, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        hit = (input_ids[:, -1] == self.token) & torch.tensor(input_ids.shape[1] > self.beyond)
        return hit


@pytest.mark.parametrize("mode", MODES)
def test_custom_criteria_see_the_prefixes_of_one_token_decoding(mode):
    model = tiny_model("qwen3")
    inputs = prompts([6])
    free = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
    token = int(free[0, 6 + 20])
    ours, theirs = EndsIn(token, 20), EndsIn(token, 20)
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
    found = cllm.generate(
        model, **inputs, **options, mode=mode, block_size=8, stopping_criteria=[ours]
    )
    expected = model.generate(**inputs, **options, stopping_criteria=[theirs])
    assert torch.equal(found, expected)
    assert ours.seen == theirs.seen
    assert found.shape[1] < 46


def test_stop_strings_in_a_batch_leave_padding_behind_them():
    model, tokenizer = tiny_model("llama"), letters_tokenizer()
    inputs = prompts([6, 6])
    free = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
    text = tokenizer.decode(free[0, 6:])
    found = cllm.generate(
        model,
        **inputs,
        max_new_tokens=30,
        eos_token_id=None,
        pad_token_id=PAD,
        stop_strings=[text[3:6]],
        tokenizer=tokenizer,
        do_sample=False,
    )
    kept = found[0] != PAD
    end = int(kept.nonzero().max()) + 1
    assert end < 36 and torch.equal(found[0, :end], free[0, :end])
    assert bool((found[0, end:] == PAD).all())


def test_max_time_ends_the_call():
    model = tiny_model("llama")
    found = cllm.generate(
        model, **prompts([4]), max_new_tokens=200, max_time=0.0, eos_token_id=None, block_size=4
    )
    assert 4 < found.shape[1] <= 8


def test_max_iterations_returns_what_is_final():
    model = tiny_model("llama")
    inputs = prompts([4, 2])
    whole = cllm.generate(model, **inputs, max_new_tokens=60, eos_token_id=None)
    part = cllm.generate(
        model,
        **inputs,
        max_new_tokens=60,
        eos_token_id=None,
        max_iterations=5,
        return_dict_in_generate=True,
    )
    assert part.forwards == 5
    for row in range(2):
        end = 4 + int(part.accepted[row])
        assert torch.equal(part.sequences[row, :end], whole[row, :end])
