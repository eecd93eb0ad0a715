"""Exact sampling: one text for each key, and texts as the model says."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import logits_process

import cllm
import cllm_kernels
from cllm.decoding import decode
from cllm.decoding.predict import Predictor, fused_head

from .test_gated import random_adapter
from .tiny_models import VOCAB, fresh_model, prompts, tiny_model

WARPERS = {
    "none": {"top_k": 0},
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.7, "top_k": 0},
    "min-p": {"min_p": 0.2, "temperature": 1.5, "top_k": 0},
    "typical": {"typical_p": 0.6, "top_k": 0},
    "epsilon and eta": {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_k": 0},
    "processors": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_k": 30},
}


@torch.no_grad()
def one_at_a_time(model, tokens, row, seed, count, options):
    """The definition: a forward over the whole text for each token, HuggingFace's processors, the
    noise of that place, the best of the sum."""
    config = GenerationConfig(do_sample=True, pad_token_id=0, **options)
    processors = model._get_logits_processor(config, input_ids_seq_length=tokens.shape[1])
    for _ in range(count):
        scores = processors(tokens, model(tokens).logits[:, -1].float())
        place = torch.tensor([tokens.shape[1]])
        noise = cllm_kernels.gumbel_noise(seed, torch.tensor([row]), place, scores.shape[-1])
        tokens = torch.cat([tokens, (scores + noise).argmax(dim=-1, keepdim=True)], dim=1)
    return tokens[0]


@pytest.mark.parametrize("options", WARPERS.values(), ids=WARPERS.keys())
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_equals_its_definition(family, options):
    # older transformers let a penalty on repetition see the padding
    lengths = [9, 9] if "repetition_penalty" in options else [9, 4]
    model, inputs = tiny_model(family), prompts(lengths)
    settings = dict(max_new_tokens=24, do_sample=True, seed=11, eos_token_id=None, **options)
    found = cllm.generate(model, **inputs, block_size=6, **settings)
    for row, length in enumerate(lengths):
        text = inputs["input_ids"][row : row + 1, 9 - length :]
        assert torch.equal(
            found[row, 9 - length :], one_at_a_time(model, text, row, 11, 24, options)
        )


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    new_tokens=st.integers(1, 24),
    block_size=st.integers(2, 24),
    mode=st.sampled_from(["sliding", "block"]),
    fill=st.sampled_from(["prompt", "last", "random", "pad"]),
    lookup=st.sampled_from([0, 3]),
    accept=st.sampled_from(["all", "one"]),
    adapted=st.booleans(),
    options=st.sampled_from(list(WARPERS.values())),
    seed=st.integers(0, 2**63 - 1),
)
def test_one_text_for_every_way_of_decoding(
    lengths, new_tokens, block_size, mode, fill, lookup, accept, adapted, options, seed
):
    model, inputs = tiny_model("qwen3"), prompts(lengths, seed=seed % 97)
    settings = dict(max_new_tokens=new_tokens, do_sample=True, seed=seed, **options)
    expected = cllm.generate(model, **inputs, block_size=1, **settings)
    found = cllm.generate(
        model,
        **inputs,
        block_size=block_size,
        mode=mode,
        fill=fill,
        lookup=lookup if mode == "sliding" else 0,
        accept=accept,
        adapter=random_adapter("qwen3", 0.05) if adapted else None,
        **settings,
    )
    assert torch.equal(found, expected)
    # as above: of padded rows no text alone can be compared then
    row = lengths.index(max(lengths)) if "repetition_penalty" in options else seed % len(lengths)
    mask = inputs["attention_mask"][row].bool()
    alone = cllm.generate(
        model,
        inputs["input_ids"][row][mask][None],
        block_size=block_size,
        row_ids=[row],
        **settings,
    )
    assert torch.equal(alone[0], expected[row][max(lengths) - lengths[row] :][: alone.shape[1]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"top_k": 0}, {"temperature": 1.7, "top_k": 40, "top_p": 0.9}],
    ids=["temperature 1", "warpers"],
)
def test_samples_are_distributed_as_the_model_says(options):
    """Chi-squared over 10^5 pairs of tokens, which are drawn in one forward where guesses hold."""
    model, draws = tiny_model("llama"), 100_000
    ids = prompts([6])["input_ids"]
    outs = [
        cllm.generate(
            model,
            ids,
            do_sample=True,
            max_new_tokens=2,
            seed=seed,
            block_size=2,
            num_return_sequences=draws // 10,
            eos_token_id=None,
            **options,
        )[:, 6:]
        for seed in range(10)
    ]
    counts = torch.cat(outs) @ torch.tensor([VOCAB, 1])
    counts = torch.bincount(counts, minlength=VOCAB * VOCAB).double()
    # what HuggingFace's own sampling draws from: its processed scores
    given = dict(do_sample=True, return_dict_in_generate=True, output_scores=True, **options)
    first = model.generate(ids, max_new_tokens=1, eos_token_id=None, **given).scores[0][0]
    followed = torch.cat([ids.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], dim=1)
    second = model.generate(followed, max_new_tokens=1, eos_token_id=None, **given).scores[0]
    expected = first.double().softmax(dim=-1)[:, None] * second.double().softmax(dim=-1)
    expected = expected.flatten() * draws
    assert counts[expected == 0].sum() == 0
    # rare pairs together, as the test asks for
    often = expected >= 10
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    keep = wanted > 0
    statistic = ((observed - wanted).square() / wanted)[keep].sum()
    freedom = torch.tensor((int(keep.sum()) - 1) / 2, dtype=torch.float64)
    assert freedom > 20
    assert 1e-3 < torch.special.gammaincc(freedom, statistic / 2) < 1 - 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_fused_head_draws_the_same(family, monkeypatch):
    model, inputs = tiny_model(family), prompts([9, 4])
    used = []
    monkeypatch.setattr(decode, "fused_head", lambda model: used.append(1) or fused_head(model))
    settings = dict(max_new_tokens=30, do_sample=True, seed=3, block_size=5, temperature=0.8)
    fused = cllm.generate(model, **inputs, top_k=0, **settings)
    assert used and fused_head(model) is not None
    monkeypatch.setattr(decode, "fused_head", lambda model: None)
    assert torch.equal(fused, cllm.generate(model, **inputs, top_k=0, **settings))


def test_seeds_and_generators():
    model, inputs = tiny_model("llama"), prompts([6])
    settings = dict(max_new_tokens=20, do_sample=True)

    def sample(**changes):
        return cllm.generate(model, **inputs, **settings, **changes)

    torch.manual_seed(4)
    first, second = sample(), sample()
    torch.manual_seed(4)
    assert torch.equal(first, sample()) and not torch.equal(first, second)
    assert torch.equal(sample(seed=0), sample(seed=0))
    assert not torch.equal(sample(seed=0), sample(seed=1))
    drawn = [sample(generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], first)
    # guesses are not what a call draws for
    assert torch.equal(
        cllm.generate(model, **inputs, max_new_tokens=20, seed=3),
        model.generate(**inputs, max_new_tokens=20),
    )


def test_return_sequences_are_different_samples():
    model, inputs = tiny_model("llama"), prompts([6, 3])
    settings = dict(max_new_tokens=20, do_sample=True, seed=5)
    found = cllm.generate(model, **inputs, num_return_sequences=3, block_size=4, **settings)
    assert found.shape[0] == 6
    assert len({tuple(row[6:].tolist()) for row in found}) == 6
    again = cllm.generate(
        model, **inputs, num_return_sequences=3, row_ids=[0, 1, 2, 3, 9, 9], **settings
    )
    assert torch.equal(again[:4], found[:4])
    assert torch.equal(again[4], again[5]) and not torch.equal(again[4], found[4])


def test_a_patched_model_samples_and_says_nothing(recwarn):
    model, inputs = fresh_model(), prompts([6])
    expected = cllm.generate(model, **inputs, max_new_tokens=20, do_sample=True, seed=2)
    with cllm.patched(model):
        found = model.generate(
            **inputs,
            max_new_tokens=20,
            do_sample=True,
            seed=2,
            return_dict_in_generate=True,
        )
    assert torch.equal(found.sequences, expected) and found.forwards < 20
    assert not [warning for warning in recwarn if "Jacobi" in str(warning.message)]


ROWWISE = [
    logits_process.TemperatureLogitsWarper(0.7),
    logits_process.TopKLogitsWarper(9),
    logits_process.TopPLogitsWarper(0.8),
    logits_process.MinPLogitsWarper(0.1),
    logits_process.TypicalLogitsWarper(0.7),
    logits_process.EpsilonLogitsWarper(0.01),
    logits_process.EtaLogitsWarper(0.01),
    logits_process.SuppressTokensLogitsProcessor([3, 5]),
    logits_process.InfNanRemoveLogitsProcessor(),
    logits_process.LogitNormalization(),
    *(
        [logits_process.TopHLogitsWarper(0.5)]
        if hasattr(logits_process, "TopHLogitsWarper")
        else []
    ),
]


@pytest.mark.parametrize("processor", ROWWISE, ids=lambda entry: type(entry).__name__)
def test_processors_that_take_all_positions_at_once(processor):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, VOCAB, generator=generator) * 3
    window = torch.randint(VOCAB, (3, 5), generator=generator)
    sequences = torch.randint(VOCAB, (3, 20), generator=generator)
    assert not Predictor([processor]).needs_prefixes
    untouched = logits.clone()
    at_once = Predictor([processor]).tokens(
        logits, window, sequences, torch.tensor([9, 12, 9]), [9, 12, 9]
    )
    assert torch.equal(logits, untouched)

    class Same(LogitsProcessor):  # not known to be row-wise
        def __call__(self, input_ids, scores):
            return processor(input_ids, scores)

    one_by_one = Predictor([Same()])
    assert one_by_one.needs_prefixes
    window[:, 1:] = at_once[:, :-1]  # it goes as far as guesses are right
    assert torch.equal(
        at_once,
        one_by_one.tokens(logits, window, sequences, torch.tensor([9, 12, 9]), [9, 12, 9]),
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be None or an integer in"),
        ({"seed": 1.5}, ValueError, "seed must be None or an integer in"),
        ({"row_ids": [0, 1]}, ValueError, "row_ids must be 1 integers, one for each row"),
        ({"row_ids": [2**32]}, ValueError, r"row_ids must lie in \[0, 2\*\*32\)"),
        ({"row_ids": [0.5]}, ValueError, "row_ids must be 1 integers"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, not int"),
        ({"do_sample": False, "row_ids": [0]}, ValueError, "row_ids is about sampling"),
        (
            {"do_sample": False, "generator": torch.Generator()},
            ValueError,
            "generator is about sampling",
        ),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"num_beams": 2}, cllm.UnsupportedOptionError, "num_beams=2"),
    ],
)
def test_bad_input(options, error, message):
    options = {"do_sample": True, **options}
    with pytest.raises(error, match=message):
        cllm.generate(tiny_model("llama"), **prompts([6]), max_new_tokens=4, **options)


def test_whoever_hooks_the_head_later_is_heard():
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([12])
    settings = dict(max_new_tokens=20, do_sample=True, seed=7, temperature=5.0, top_k=0)
    free = cllm.generate(model, **inputs, **settings)

    def ban(module, given, out):
        logits = out if isinstance(out, torch.Tensor) else out.logits
        logits[..., :90] = -1e9

    for module in (model.lm_head, model):
        handle = module.register_forward_hook(ban)
        assert int(cllm.generate(model, **inputs, **settings)[0, 12:].min()) >= 90
        handle.remove()
        assert torch.equal(cllm.generate(model, **inputs, **settings), free)


def test_another_head_takes_the_place_of_the_one_that_was_known():
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([12])
    settings = dict(max_new_tokens=20, do_sample=True, seed=7)
    cllm.generate(model, **inputs, **settings)
    peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False), model
    )
    found = cllm.generate(model, **inputs, **settings)
    assert torch.equal(found, cllm.generate(model, **inputs, block_size=1, **settings))
