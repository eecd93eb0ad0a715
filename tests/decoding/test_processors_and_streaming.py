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
