from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cllm.prompts import Prompt, PromptError
from cllm.responders import end_tokens, make_responder, up_to_end
from cllm.training.collect.cleaning import NOT_ITS_OWN, Cleaning
from cllm.training.collect.responses import brought_tokens, respond, with_end
from cllm.training.collect.shard import CollectOptions, ShardMaker
from cllm.training.collect.sources import Row
from tests.decoding.tiny_models import EOS, fresh_model, tiny_model
from tests.decoding.tokenizer import letters_tokenizer

ENDS = frozenset([EOS])
TEXT = "the cat sat on the mat. and the dog sat on the log\nthe end "


def trained(marks_beginnings: bool) -> PreTrainedTokenizerFast:
    """A BPE that puts a space in front of a text, as Llama's does, or one that does not."""
    raw = Tokenizer(models.BPE())
    if marks_beginnings:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        raw.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted(set(TEXT))
    else:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False,
                            special_tokens=["<s>", "<|im|>"]),
    )  # fmt: skip
    raw.add_special_tokens([AddedToken("<|im|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


@pytest.mark.parametrize("marks_beginnings", [False, True])
@pytest.mark.parametrize("front", ["<|im|>user\n", "the dog", "<s>"])
def test_text_continues_the_prompt(marks_beginnings, front):
    """The words of a text get the tokens that they have in the middle of one."""
    tokenizer = trained(marks_beginnings)
    compared = 0
    for text in (" sat on the mat.", "\nthe end", "the cat sat"):
        prompt = tokenizer(front, add_special_tokens=False)["input_ids"]
        whole = tokenizer(front + text, add_special_tokens=False)["input_ids"]
        if whole[: len(prompt)] != prompt:
            continue  # the two grow together where they meet
        compared += 1
        tokens = brought_tokens(tokenizer, prompt, text, vocab_size=300, ends=ENDS, where="")
        assert tokens == whole[len(prompt) :]
    assert compared


def test_token_ids_are_taken_as_they_are_up_to_the_end():
    tokenizer = letters_tokenizer()
    options = {"vocab_size": 97, "ends": ENDS, "where": "the prompt of line 4"}
    assert brought_tokens(tokenizer, [3], [5, 96, EOS, 7], **options) == [5, 96, EOS]
    assert brought_tokens(tokenizer, [3], "", **options) == []
    with pytest.raises(PromptError, match=r"line 4 has the token id 97, but .* has 97 entries"):
        brought_tokens(tokenizer, [3], [5, 97], **options)
    with pytest.raises(PromptError, match="token id -1"):
        brought_tokens(tokenizer, [3], [-1], **options)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(31, 50)),
)
def test_batches_cover_every_prompt_within_the_context(lengths, batch_size, context):
    """Answers come back in order, and no prompt is asked for more than the context holds."""
    calls = []

    def responder(prompts, limit):
        calls.append((len(prompts), limit))
        assert context is None or max(map(len, prompts)) + limit <= context
        return [[prompt[0]] * limit for prompt in prompts]

    prompts = [[index] * length for index, length in enumerate(lengths)]
    found = respond(responder, prompts, max_new_tokens=20, batch_size=batch_size, context=context)
    for index, (length, answer) in enumerate(zip(lengths, found, strict=True)):
        room = 20 if context is None else min(20, context - length)
        assert answer == [index] * room
    assert sum(size for size, _ in calls) == len(prompts)
    assert all(size == 1 for size, limit in calls if limit < 20)
    assert all(size <= batch_size for size, _ in calls)


def test_ends_are_asked_for_only_where_they_are_open():
    asked = []

    def responder(prompts, limit):
        asked.extend(map(tuple, prompts))
        return [[EOS] if prompt[-1] == 5 else [9] for prompt in prompts]

    responses = [[4, 5], [4, EOS], [4, 6], [], [5] * 8]
    found = with_end(responder, [[3]] * 5, responses, ends=ENDS, batch_size=2, context=9)
    assert found == [[4, 5, EOS], [4, EOS], [4, 6], [], [5] * 8]
    assert sorted(asked) == [(3, 4, 5), (3, 4, 6)]


@pytest.mark.parametrize("engine", ["jacobi", "huggingface"])
def test_responders_give_the_argmax_whatever_the_generation_config_says(engine):
    model = fresh_model("llama")
    plain = [[5, 6, 7], [8, 9, 10, 11, 12]]
    wanted = make_responder(tiny_model("llama"), "huggingface")(plain, 12)
    config = model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty = True, 2.0, 5.0
    assert make_responder(model, engine)(plain, 12) == wanted
    assert model.generation_config is config
    assert end_tokens(model) == ENDS
    # each is what a prompt alone gets, token by token
    for prompt, answer in zip(plain, wanted, strict=True):
        text = list(prompt)
        while len(text) < len(prompt) + 12 and text[-1] != EOS:
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        assert text[len(prompt) :] == answer
    assert make_responder(model, engine)([], 3) == []


def test_unknown_engine():
    with pytest.raises(ValueError, match="engine must be one of jacobi, huggingface, not 'x'"):
        make_responder(tiny_model("llama"), "x")
    assert up_to_end([4, EOS, 5], ENDS) == [4, EOS]


def make(responses, tolerance: float = 1e-3):
    """A shard from the responses `responses` brought for one prompt each."""
    model, tokenizer = tiny_model("llama"), letters_tokenizer()
    off = Cleaning(dedup=False, max_cycle=1, max_repeated_ngrams=1, max_repeated_sentences=1)
    options = CollectOptions(block_size=4, max_new_tokens=12, cleaning=off, tolerance=tolerance)
    maker = ShardMaker(model, tokenizer, make_responder(model), options, ENDS)
    rows = [Row(Prompt(str(i), "abc"), response) for i, response in enumerate(responses)]
    return maker.make(rows, [True] * len(rows))


def test_a_near_tie_is_its_own_and_a_wrong_token_is_not():
    """A runner-up within the tolerance counts as rounding; beyond it, as another's."""
    model = tiny_model("llama")
    prompt = letters_tokenizer()("abc")["input_ids"]
    own = make_responder(model)([prompt], 12)[0]
    logits = model(input_ids=torch.tensor([prompt + own])).logits[0, len(prompt) - 1 :]
    place = 5
    best, second = logits[place].topk(2).values.tolist()
    other = [*own[:place], int(logits[place].topk(2).indices[1])]
    own = own[: place + 1]

    result = make([own, other], tolerance=(best - second) * 0.99)
    assert [example.response[: place + 1] for example in result.examples] == [own]
    assert result.dropped == {NOT_ITS_OWN: 1}
    assert (result.counts["checked"], result.counts["mismatched"]) == (2, 1)
    result = make([own, other], tolerance=(best - second) * 1.01)
    assert [example.response[: place + 1] for example in result.examples] == [own, other]
    assert not result.dropped and result.counts["near_ties"] == 1
    # its trajectory leads to the response, not to the argmax
    blocks = result.examples[1].blocks
    assert [token for block in blocks for token in block.fixed_point][: place + 1] == other


def test_brought_responses_are_cut_at_the_limit():
    model = tiny_model("llama")
    prompt = letters_tokenizer()("abc")["input_ids"]
    long = make_responder(model)([prompt], 20)[0]
    assert len(long) == 20
    assert [example.response for example in make([long]).examples] == [long[:12]]
