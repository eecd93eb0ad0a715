"""Guesses from the source that has been right most often: of models whose own are, or are not."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import cllm
from cllm.decoding import auto
from cllm.decoding.odds import GuessOdds

from .test_gated import greedy, random_adapter
from .tiny_models import VOCAB, prompts, tiny_model


def told_by_place():
    """A model that sees where a token stands and not which: all it predicts is right at once, and
    neither what it said before nor the text says anything of it."""
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=256,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.normal_(0, 4)
        model.transformer.h[0].attn.c_proj.weight.zero_()
    return model


def forwards(model, inputs, **settings):
    out = cllm.generate(
        model, **inputs, max_new_tokens=96, block_size=8, return_dict_in_generate=True, **settings
    )
    return out.forwards, out.sequences


@pytest.mark.parametrize("batch", [[21], [9, 30, 4]])
def test_a_model_that_guesses_well_is_let_guess(batch):
    model, inputs = told_by_place(), prompts(batch)
    alone, expected = forwards(model, inputs, lookup=0)
    # of a window of 8 that is right as a whole one prediction is left, the rest of the next is new
    assert alone == 22
    ordered, same = forwards(model, inputs, guesses="ordered")
    weighed, too = forwards(model, inputs)
    assert torch.equal(same, expected) and torch.equal(too, expected)
    assert ordered > 2 * alone
    assert weighed <= alone + 2


def test_one_that_does_not_is_not():
    """Random weights: their own left-over predictions are next to never right."""
    model, inputs = tiny_model("llama"), prompts([21, 6, 13])
    alone, _ = forwards(model, inputs, lookup=0)
    ordered, _ = forwards(model, inputs, guesses="ordered")
    weighed, _ = forwards(model, inputs)
    assert weighed < 1.1 * ordered < 0.8 * alone


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "sources",
    [{}, {"lookup": 0, "pool": True}, {"pool": False}, {"lookup": 12, "lookup_least": 1}],
)
def test_the_text_is_greedy_searchs(family, sources):
    model, inputs = tiny_model(family), prompts([21, 6, 13])
    expected = greedy(model, inputs, max_new_tokens=40)
    for adapter in (None, random_adapter(family, 0.05)):
        for candidates in (1, 3):
            found = cllm.generate(
                model, **inputs, max_new_tokens=40, block_size=5, candidates=candidates,
                adapter=adapter, **sources,
            )  # fmt: skip
            assert torch.equal(found, expected)


def test_several_candidates_begin_with_the_best():
    model, inputs = told_by_place(), prompts([9, 30, 4])
    alone, expected = forwards(model, inputs, lookup=0)
    # single tokens that stood in the text before take both places
    several = dict(candidates=2, lookup_least=1)
    ordered, same = forwards(model, inputs, guesses="ordered", **several)
    weighed, too = forwards(model, inputs, **several)
    assert torch.equal(same, expected) and torch.equal(too, expected)
    assert weighed <= alone + 2 < ordered


def test_rows_know_nothing_of_each_other():
    model, inputs = told_by_place(), prompts([21, 6, 13])
    settings = dict(max_new_tokens=60, block_size=6, return_dict_in_generate=True)
    found = cllm.generate(model, **inputs, **settings)
    for row in range(3):
        mask = inputs["attention_mask"][row].bool()
        alone = cllm.generate(model, inputs["input_ids"][row][mask][None], **settings)
        assert alone.iterations.tolist() == [found.iterations[row].item()]


def test_an_automatic_call_goes_by_what_the_calls_before_it_have_learnt(monkeypatch):
    monkeypatch.setattr(auto, "PLAIN", (8,))
    model, inputs = told_by_place(), prompts([21, 6])
    settings = dict(max_new_tokens=24, block_size="auto", return_dict_in_generate=True)
    first, second, third = (cllm.generate(model, **inputs, **settings) for _ in range(3))
    assert second.forwards < first.forwards and third.forwards == second.forwards
    assert torch.equal(first.sequences, second.sequences)
    # other sources have learnt nothing
    other = cllm.generate(model, **inputs, lookup=5, **settings)
    assert other.forwards == first.forwards


def test_a_clone_goes_its_own_way_until_it_is_loaded():
    odds = GuessOdds(2, 5, 10, gated=False, device=torch.device("cpu"))
    twin = odds.clone()
    for tensor in odds.kept.values():
        tensor += 1
    assert all(
        torch.equal(one, other + 1)
        for one, other in zip(odds.kept.values(), twin.kept.values(), strict=True)
    )
    twin.load(odds)
    assert all(
        torch.equal(one, other)
        for one, other in zip(odds.kept.values(), twin.kept.values(), strict=True)
    )
    assert twin.nbytes == odds.nbytes == 8 * 2 * (12 * 2 + 3 * 5 + 1)
    # an adapter is believed in more than what is left over
    gated = GuessOdds(1, 5, 0, gated=True, device=torch.device("cpu"))
    assert gated.odds.shape == (1, 2, 2) and gated.odds[0, 0, 0] > odds.odds[0, 0, 0]


def test_bad_settings():
    with pytest.raises(ValueError, match="guesses='ordered' needs mode='sliding'"):
        cllm.JacobiConfig(guesses="ordered", mode="block")
    with pytest.raises(ValueError, match="guesses must be one of 'adaptive', 'ordered', not 'any'"):
        cllm.JacobiConfig(guesses="any")
