"""Texts that come to the end of a model's positions, or to where its frequencies change."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

import cllm
from cllm.decoding.support import check_model
from cllm.traits import RopeChange, rope_changes

from .tiny_models import BOS, CONFIGS, PAD, SIZES, VOCAB, prompts

THRESHOLD = 32
_SIZES = dict(SIZES, eos_token_id=None, pad_token_id=PAD, bos_token_id=BOS)
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": THRESHOLD,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
_PHI3 = dict(_SIZES, max_position_embeddings=256, original_max_position_embeddings=THRESHOLD)
CHANGING: dict[str, Any] = {
    "phi3": lambda: hf.Phi3Config(**_PHI3, rope_parameters=dict(_LONG)),
    "phimoe": lambda: hf.PhimoeConfig(
        **_SIZES,
        max_position_embeddings=256,
        num_local_experts=2,
        rope_parameters=dict(_LONG, short_mscale=1.2, long_mscale=1.3),
    ),
    "llama": lambda: hf.LlamaConfig(
        **_SIZES, max_position_embeddings=THRESHOLD, rope_parameters=dict(_DYNAMIC)
    ),
}


def made(config: Any) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


@cache
def changing(family: str) -> Any:
    return made(CHANGING[family]())


def assert_greedy(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> None:
    expected = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    for changes in (
        {"block_size": 1},
        {"block_size": 4, "fill": "random"},
        {"block_size": 16, "mode": "block"},
        {"block_size": 16, "candidates": 2},
    ):
        found = cllm.generate(model, **inputs, max_new_tokens=new_tokens, **changes)
        assert torch.equal(found, expected), changes


@pytest.mark.parametrize("family", CHANGING)
def test_a_text_below_the_change_is_right_up_to_its_last_token(family):
    """Guesses past the end of the text would be beyond the threshold, and change the frequencies of
    the whole window."""
    # the last token is in no forward, so the text may have one more than the threshold
    assert_greedy(changing(family), prompts([20]), 13)
    assert_greedy(changing(family), prompts([20, 7]), 13)


@pytest.mark.parametrize("family", CHANGING)
def test_a_text_across_the_change_is_refused(family):
    model = changing(family)
    kind = check_model(model).rope_changes[0].rope_type
    assert kind == ("dynamic" if family == "llama" else "longrope")
    message = f"rope_type='{kind}' at this length: .* 32 tokens, .* 20 with up to 14 new .* 33 "
    with pytest.raises(cllm.UnsupportedOptionError, match=message):
        cllm.generate(model, **prompts([20]), max_new_tokens=14)


def test_prompts_on_both_sides_of_the_change_are_refused():
    """The frequencies of a batch are those of its longest text."""
    with pytest.raises(cllm.UnsupportedOptionError, match="has 5 to 40 with up to 3 new"):
        cllm.generate(changing("phi3"), **prompts([5, 40]), max_new_tokens=3)


def test_a_patched_model_leaves_it_to_huggingface():
    model, inputs = changing("phi3"), prompts([20])
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    with cllm.patched(model), pytest.warns(UserWarning, match="transformers' own") as told:
        for new_tokens in (40, 39):
            found = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            assert torch.equal(found, expected[:, : 20 + new_tokens])
    assert len(told) == 1


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_a_text_beyond_the_change_keeps_its_frequencies(family):
    model = changing(family)
    assert_greedy(model, prompts([34]), 40)
    assert_greedy(model, prompts([60, 34]), 40)
    # the prompt without its last token would be read with the frequencies of short texts
    with pytest.raises(cllm.UnsupportedOptionError, match="a prompt of at least 34"):
        cllm.generate(model, **prompts([33]), max_new_tokens=4)


def test_a_change_is_found_for_each_kind_of_layer():
    config = CONFIGS["gemma3"]()
    full, local = "full_attention", "sliding_attention"
    config.rope_parameters = {full: dict(_DYNAMIC), local: {"rope_type": "default"}}
    assert rope_changes(config) == (RopeChange("dynamic", 256, False),)
    config.rope_parameters = {full: dict(_LONG), local: dict(_LONG)}
    assert rope_changes(config) == (RopeChange("longrope", THRESHOLD, True),)
    # as models from outside of transformers have it
    older = SimpleNamespace(
        rope_scaling={"type": "su"},
        original_max_position_embeddings=THRESHOLD,
        max_position_embeddings=256,
    )
    assert rope_changes(older) == (RopeChange("su", THRESHOLD, True),)
    assert rope_changes(CONFIGS["gpt2"]()) == ()


_TABLE = dict(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=THRESHOLD,
    eos_token_id=None,
    pad_token_id=0,
    bos_token_id=1,
)


@cache
def bounded(family: str) -> Any:
    if family == "gptj":
        return made(hf.GPTJConfig(**_TABLE, rotary_dim=4))
    return made(hf.GPT2Config(**_TABLE))


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_text_that_must_outgrow_the_positions_is_refused(family):
    model, inputs = bounded(family), prompts([20, 7])
    # the last token needs no position
    assert_greedy(model, inputs, 13)
    message = "prompt has 20 tokens and the model 32 positions, too few for 14 new .* at most 13"
    with pytest.raises(ValueError, match=message):
        cllm.generate(model, **inputs, max_new_tokens=14)
    # transformers' own generate would end in an IndexError, on a GPU in a dead device
    with cllm.patched(model), pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=14, do_sample=False)


def test_a_text_that_ends_before_the_positions_do_may_have_any_limit():
    model, inputs = bounded("gpt2"), prompts([20, 7])
    text = model.generate(**inputs, max_new_tokens=13, do_sample=False)
    stops = text[:, 32].tolist()  # the very last token that there can be, of the first row
    expected = model.generate(**inputs, max_new_tokens=13, do_sample=False, eos_token_id=stops)
    for changes in ({"block_size": 4}, {"block_size": 16, "mode": "block"}, {"candidates": 2}):
        found = cllm.generate(model, **inputs, max_new_tokens=400, eos_token_id=stops, **changes)
        assert torch.equal(found, expected), changes

    def ends(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= 33)

    found = cllm.generate(model, **inputs, max_new_tokens=400, stopping_criteria=[ends])
    assert torch.equal(found, text)


def test_a_text_that_comes_to_the_last_position_is_refused_there():
    model = bounded("gpt2")
    limits: dict[str, Any] = dict(max_new_tokens=400, eos_token_id=VOCAB)  # which there never is
    with pytest.raises(ValueError, match=r"row 0 has come to the last of .* 32 .* 13 new tokens"):
        cllm.generate(model, **prompts([20, 7]), **limits)
    # a row has as much room as alone
    with pytest.raises(ValueError, match=r"row 0 has come to the last of .* 32 .* 26 new tokens"):
        cllm.generate(model, **prompts([7, 20]), **limits)
    found = cllm.generate(model, **prompts([20]), **limits, block_size=4, max_iterations=2)
    assert found.shape[1] < 33


def test_a_table_of_positions_that_grows_is_no_bound():
    sizes = dict(vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    model = made(hf.XGLMConfig(**sizes, max_position_embeddings=THRESHOLD, eos_token_id=None))
    assert not check_model(model).bounded_positions
    assert_greedy(model, prompts([20]), 30)
