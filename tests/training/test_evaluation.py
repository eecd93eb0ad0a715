"""Evaluation: its numbers against plain loops, and the answers of worked problems."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch

from cllm import JacobiConfig
from cllm.answers import answer_accuracy, answer_matches, final_answer
from cllm.evaluation import (
    DecodedText,
    equal_leading_share,
    evaluate,
    negative_log_likelihoods,
    summarise,
)
from cllm.text_quality import repeated_ngrams
from tests.decoding.tiny_models import EOS, PAD, fresh_model, tiny_model
from tests.decoding.tokenizer import letters_tokenizer

PROMPTS = ["the cat sat", "a", "how many eggs does the duck lay", "def add"]
CONFIG = JacobiConfig(block_size=6)


def ids_of(text: str) -> list[int]:
    return letters_tokenizer()(text)["input_ids"]


def greedy(model, prompt, length):
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=PAD,
    )
    return out[0, len(prompt) :].tolist()


def plain_nll(model, prompt, response):
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
    scores = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return -float(scores.gather(1, torch.tensor(response)[:, None]).sum())


def changed(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_is_what_plain_loops_give(batch_size):
    base, model = tiny_model("llama"), changed(fresh_model("llama")).train()
    length = 20
    result = evaluate(
        model,
        letters_tokenizer(),
        PROMPTS,
        base=base,
        config=CONFIG,
        max_new_tokens=length,
        batch_size=batch_size,
    )
    assert model.training
    model.eval()
    prompts = [ids_of(text) for text in PROMPTS]
    own = [greedy(model, prompt, length) for prompt in prompts]
    references = [greedy(base, prompt, length) for prompt in prompts]
    assert result.responses == own
    assert result.exact_match == sum(a == b for a, b in zip(own, references, strict=True)) / 4
    assert 0 < result.equal_leading < 1
    tokens = sum(map(len, own))
    assert result.tokens == tokens and result.mean_length == tokens / 4
    with torch.no_grad():
        totals = [plain_nll(base, p, r) for p, r in zip(prompts, own, strict=True)]
        base_totals = [plain_nll(base, p, r) for p, r in zip(prompts, references, strict=True)]
    assert result.nll_under_base == pytest.approx(sum(totals) / tokens, rel=1e-5)
    assert result.base_nll == pytest.approx(sum(base_totals) / sum(map(len, references)), rel=1e-5)
    assert result.nll_under_base > result.base_nll
    assert result.repetition == pytest.approx(sum(map(repeated_ngrams, own)) / 4)
    assert result.base_repetition == pytest.approx(sum(map(repeated_ngrams, references)) / 4)
    assert result.cut == sum(text[-1] != EOS for text in own) / 4
    assert result.tokens_per_forward == result.tokens / result.forwards
    assert result.fast_forwarded == pytest.approx((result.tokens - result.forwards) / 4)


def test_the_base_model_beside_itself():
    model = tiny_model("gpt2")
    result = evaluate(
        model, letters_tokenizer(), PROMPTS, base=model, config=CONFIG, max_new_tokens=12
    )
    assert result.exact_match == result.equal_leading == 1.0
    assert result.nll_under_base == result.base_nll
    assert result.repetition == result.base_repetition
    assert result.metrics().keys() >= {"tokens_per_forward", "nll_under_base", "repetition"}


def test_without_a_base_model_there_is_no_likelihood():
    result = evaluate(
        tiny_model("llama"), letters_tokenizer(), PROMPTS[:1], config=CONFIG, max_new_tokens=5
    )
    assert result.nll_under_base is None and result.exact_match is None
    assert "nll_under_base" not in result.metrics()


def test_a_peft_model_is_judged_by_itself_without_adapters():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(fresh_model("llama"), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    settings = {"config": CONFIG, "max_new_tokens": 12}
    result = evaluate(model, letters_tokenizer(), PROMPTS, **settings)
    with_base = evaluate(model, letters_tokenizer(), PROMPTS, base=tiny_model("llama"), **settings)
    assert result.responses == with_base.responses
    assert result.exact_match == with_base.exact_match < 1
    assert result.nll_under_base == pytest.approx(with_base.nll_under_base, rel=1e-6)
    assert result.base_nll == pytest.approx(with_base.base_nll, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_likelihood_in_batches_is_that_of_single_texts(family):
    # gemma2 caps its logits, and gpt2 counts absolute positions
    model = tiny_model(family)
    torch.manual_seed(3)
    prompts = [torch.randint(3, 97, (n,)).tolist() for n in (3, 9, 1, 5)]
    responses = [torch.randint(3, 97, (n,)).tolist() for n in (300, 4, 1, 0)]
    responses[0] = responses[0][:200]
    found = negative_log_likelihoods(model, prompts, responses, batch_size=3)
    with torch.no_grad():
        expected = [plain_nll(model, p, r) for p, r in zip(prompts, responses, strict=True) if r]
    assert found == pytest.approx([*expected, 0.0], rel=1e-5)


def test_summary_counts():
    texts = [
        DecodedText([5, 6, 7, EOS], forwards=2, fast_forwarded=2, stationary=1, ended=True),
        DecodedText([5] * 8, forwards=2, fast_forwarded=6, stationary=0, ended=False),
    ]
    references = [[5, 6, 7, EOS], [5] * 6 + [4, 3]]
    result = summarise(texts, references, [4.0, 2.0], [4.0, 8.0], seconds=2.0)
    assert result.tokens_per_forward == 3.0 and result.tokens_per_second == 6.0
    assert result.exact_match == 0.5 and result.equal_leading == (1 + 6 / 8) / 2
    assert result.nll_under_base == 0.5 and result.base_nll == 1.0
    assert result.repetition == pytest.approx((0 + 4 / 5) / 2)
    assert result.cut == 0.5 and result.mean_length == 6
    assert result.fast_forwarded == 4 and result.stationary == 0.5


def test_equal_leading_share():
    assert equal_leading_share([1, 2, 3], [1, 2, 3]) == 1.0
    assert equal_leading_share([1, 2], [1, 2, 3, 4]) == 0.5
    assert equal_leading_share([1, 9, 3], [1, 2, 3]) == pytest.approx(1 / 3)
    assert equal_leading_share([], []) == 1.0


def test_bad_input():
    model, tokenizer = tiny_model("llama"), letters_tokenizer()
    with pytest.raises(ValueError, match="no prompts to evaluate on"):
        evaluate(model, tokenizer, [])
    with pytest.raises(ValueError, match="the prompt is empty"):
        evaluate(model, tokenizer, [""])
    with pytest.raises(ValueError, match="2 prompts but 1 references"):
        evaluate(model, tokenizer, ["a", "b"], references=[[1]])
    with pytest.raises(ValueError, match="has 300 tokens, but the model's context is 256"):
        evaluate(model, tokenizer, [[5] * 300])
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(model, tokenizer, ["a"], batch_size=0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 16-3-4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $18.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -5 degrees", "-5"),
        ("#### $70,000.50", "70000.50"),
        ("She has 3 apples and 4 pears, so 7.", "7"),
        ("The answer is $\\boxed{42}$.", "42"),
        ("16-3", "3"),
        ("it falls to -3", "-3"),
        ("half, or .5", "0.5"),
        ("#### none, but 3 before", "3"),
        ("3 of them #### \nthen nothing", "3"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_final_answer(text, number):
    assert final_answer(text) == (None if number is None else Decimal(number))


def test_answers_match_by_value():
    assert answer_matches("It is 18.00 dollars", "#### 18")
    assert not answer_matches("It is 18.5", "#### 18")
    assert not answer_matches("I do not know", "#### 18")
    assert answer_accuracy(["1", "#### 2", "x"], ["#### 1", "#### 2", "#### 3"]) == 2 / 3
    with pytest.raises(ValueError, match="reference answer holds no number"):
        answer_matches("1", "nothing")
    with pytest.raises(ValueError, match="1 texts but 2"):
        answer_accuracy(["1"], ["1", "2"])
    with pytest.raises(ValueError, match="no texts"):
        answer_accuracy([], [])
