"""Logits processors see one-token prefixes; streamers see accepted tokens only."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import (
    LogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    TextIteratorStreamer,
    TextStreamer,
)

import cllm

from .tiny_models import EOS, VOCAB, prompts, tiny_model
from .tokenizer import letters_tokenizer

PROCESSORS = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated n-grams": {"no_repeat_ngram_size": 2},
    "least length": {"min_new_tokens": 25},
    "bad words": lambda text: {"bad_words_ids": [[text[4]], text[8:10], [60]]},
    "suppressed": lambda text: {
        "suppress_tokens": [text[3], text[12]],
        "begin_suppress_tokens": [text[0], EOS],
    },
    "forced end": {"forced_eos_token_id": EOS},
    "bias": {"sequence_bias": [[[12], 4.0], [[13, 14], 6.0]]},
    "all at once": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 9},
}


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_equals_huggingface_with_processors(options, mode):
    model = tiny_model("qwen3")
    for lengths in ([6], [8, 3, 5]):
        inputs = prompts(lengths)
        plain = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        if callable(options):
            options = options(plain[0, lengths[0] :].tolist())
        expected = model.generate(**inputs, max_new_tokens=30, do_sample=False, **options)
        found = cllm.generate(
            model,
            **inputs,
            max_new_tokens=30,
            do_sample=False,
            block_size=8,
            mode=mode,
            **options,
        )
        assert torch.equal(found, expected)
        if "forced_eos_token_id" not in options and "min_new_tokens" not in options:
            assert not torch.equal(expected, plain), "the option changes nothing here: no test"


class LengthParity(LogitsProcessor):
    """Allows odd ids behind odd lengths, so that a wrong prefix length shows at once."""

    def __call__(self, input_ids, scores):
        wrong = torch.arange(VOCAB) % 2 != input_ids.shape[1] % 2
        return scores.masked_fill(wrong, -torch.inf)


def test_custom_processor_and_row_index():
    model = tiny_model("qwen3")
    inputs = prompts([6, 2, 4])

    def allowed(row, tokens):
        return [3 + row, 20 + row, 40 + (int(tokens[-1]) + row) % 30]

    expected, found = (
        generate(
            **inputs,
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[PrefixConstrainedLogitsProcessor(allowed, 1)],
        )
        for generate in (model.generate, lambda **kw: cllm.generate(model, block_size=6, **kw))
    )
    assert torch.equal(found, expected)
    expected, found = (
        generate(**inputs, max_new_tokens=24, do_sample=False, logits_processor=[LengthParity()])
        for generate in (model.generate, lambda **kw: cllm.generate(model, block_size=6, **kw))
    )
    assert torch.equal(found, expected)


def beginnings(text, prompt):
    return [tuple(text[:length]) for length in range(prompt, len(text))]


@pytest.mark.parametrize("sampled", [{"do_sample": False}, {"do_sample": True, "seed": 3}])
@pytest.mark.parametrize("mode", ["sliding", "block"])
def test_a_processor_sees_the_text_and_nothing_else(mode, sampled):
    """So one that has state, or knows what texts there can be, works as in one-token decoding."""
    model, inputs, seen = tiny_model("llama"), prompts([12]), []

    class Watching(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(tuple(input_ids[0].tolist()))
            return scores

    settings = dict(max_new_tokens=40, block_size=6, mode=mode, **sampled)
    text = cllm.generate(model, **inputs, logits_processor=[Watching()], **settings)[0].tolist()
    assert set(seen) == set(beginnings(text, 12))
    if mode == "sliding":  # a block's beginning is scored again by its next forward
        assert len(seen) == len(text) - 12


def test_texts_of_a_grammar():
    tree = {(): [5, 6], (5,): [7], (6,): [8], (5, 7): [9, 10], (6, 8): [11]}
    tree |= {(5, 7, 9): [12], (5, 7, 10): [13], (6, 8, 11): [14]}

    def allowed(row, tokens):
        return tree.get(tuple(tokens[12:].tolist()), [EOS] if len(tokens) == 16 else [])

    model, inputs = tiny_model("llama"), prompts([12])
    settings = dict(max_new_tokens=8, do_sample=False, prefix_allowed_tokens_fn=allowed)
    expected = model.generate(**inputs, **settings)
    for size in (1, 4, 8):
        assert torch.equal(cllm.generate(model, **inputs, block_size=size, **settings), expected)
    with pytest.raises(ValueError, match="allows no token behind the 12 tokens of row 0"):
        cllm.generate(model, **inputs, prefix_allowed_tokens_fn=lambda row, tokens: [])


def test_rows_of_a_batch_are_asked_for_by_their_own_text():
    """One that ends early, and others at other lengths, do not stand in for each other."""
    model, inputs = tiny_model("llama"), prompts([5, 5, 5])

    def allowed(row, tokens):
        mine = tokens[5:].tolist()
        assert all(token % 3 == row or token == EOS for token in mine), "another row's text"
        return [EOS] if len(mine) == 4 * (row + 1) else list(range(3 + row, VOCAB, 3))

    settings = dict(max_new_tokens=30, do_sample=False, prefix_allowed_tokens_fn=allowed)
    found = cllm.generate(model, **inputs, block_size=5, **settings)
    alone = {name: tensor[2:] for name, tensor in inputs.items()}

    def third(row, tokens):
        return allowed(2, tokens)

    last = model.generate(**alone, **settings | {"prefix_allowed_tokens_fn": third})
    assert torch.equal(found[2:], last)
    assert [int((row == EOS).nonzero()[0, 0]) for row in found[:, 5:]] == [4, 8, 12]


def test_rows_of_one_prompt_are_asked_for_as_transformers_does():
    """By the prompt's number, in older versions by the row's own."""
    model, inputs = tiny_model("llama"), prompts([5, 5])
    asked = set()

    def allowed(row, tokens):
        asked.add(row)
        return [EOS] if len(tokens) == 11 else list(range(3 + row, VOCAB, 2))

    settings = dict(
        max_new_tokens=8, do_sample=True, num_return_sequences=3, prefix_allowed_tokens_fn=allowed
    )
    model.generate(**inputs, **settings)
    theirs = set(asked)
    asked.clear()
    found = cllm.generate(model, **inputs, **settings, seed=3, block_size=4)
    assert asked == theirs
    for row, tokens in enumerate(found[:, 5:11].tolist()):
        number = row // 3 if theirs == {0, 1} else row
        assert all(token % 2 == (3 + number) % 2 for token in tokens)


def test_what_alone_is_allowed_comes_though_it_was_forbidden():
    model, inputs = tiny_model("llama"), prompts([5])
    found = cllm.generate(
        model, **inputs, max_new_tokens=6, do_sample=False, block_size=3,
        bad_words_ids=[[7], [8]], prefix_allowed_tokens_fn=lambda row, tokens: [7, 8],
    )  # fmt: skip
    assert set(found[0, 5:].tolist()) <= {7, 8}


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("mode", ["sliding", "block"])
def test_streamer_gets_the_prompt_then_accepted_runs(mode):
    model = tiny_model("mistral")
    inputs = prompts([6])
    streamer = Recorder()
    output = cllm.generate(
        model,
        **inputs,
        max_new_tokens=40,
        streamer=streamer,
        mode=mode,
        return_dict_in_generate=True,
        record_trajectories=True,
    )
    assert torch.equal(streamer.pieces[0], inputs["input_ids"])
    assert torch.equal(torch.cat(streamer.pieces[1:]), output.sequences[0, 6:])
    runs = [iteration.accepted for iteration in output.trajectories[0].iterations]
    assert [len(piece) for piece in streamer.pieces[1:]] == runs
    assert max(runs) > 1, "every run is one token long: no test"
    assert streamer.ended == 1


def test_text_streamers(capsys):
    model, tokenizer = tiny_model("llama"), letters_tokenizer()
    inputs = prompts([6])
    expected = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 6:]
    )
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    cllm.generate(model, **inputs, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == expected + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    thread = threading.Thread(
        target=cllm.generate, args=(model,), kwargs=dict(inputs, **options, streamer=streamer)
    )
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_streamer_takes_one_row():
    with pytest.raises(ValueError, match="batch of 1"):
        cllm.generate(tiny_model("llama"), **prompts([3, 2]), streamer=Recorder())
