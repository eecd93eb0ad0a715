"""`cllm.verify` tells exact tokens from near-ties and from wrong ones."""

from __future__ import annotations

import pytest
import torch

import cllm

from .tiny_models import prompts, tiny_model


def test_greedy_text_is_exact():
    model = tiny_model("llama")
    inputs = prompts([6, 3])
    sequences = cllm.generate(model, **inputs, max_new_tokens=20)
    result = cllm.verify(model, sequences, 6, attention_mask=inputs["attention_mask"])
    assert result.ok and result.near_tie == 0
    assert result.exact == int((~result.gap.isnan()).sum()) > 20
    assert "exact" in result.summary()


def test_a_wrong_token_is_found_with_its_gap():
    model = tiny_model("llama")
    inputs = prompts([6])
    sequences = cllm.generate(model, **inputs, max_new_tokens=12, eos_token_id=None)
    logits = model(input_ids=sequences).logits[0]
    runner_up = int(logits[6 + 4 - 1].topk(2).indices[1])
    gap = float(logits[6 + 4 - 1].topk(2).values.diff().abs())
    sequences[0, 6 + 4] = runner_up
    result = cllm.verify(model, sequences, 6)
    assert result.near_ties()[0] == (0, 4, pytest.approx(gap, rel=1e-4))
    assert not result.ok
    assert cllm.verify(model, sequences[:, : 6 + 5], 6, tolerance=gap + 1).near_tie == 1


def test_tokens_after_the_end_do_not_count():
    model = tiny_model("llama")
    sequences = torch.tensor([[5, 6, 7, 2, 0, 0]])
    result = cllm.verify(model, sequences, 2)
    assert result.gap.isnan().tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("length", [0, 5])
def test_bad_prompt_length(length):
    with pytest.raises(ValueError, match="prompt_length"):
        cllm.verify(tiny_model("llama"), torch.tensor([[5, 6, 7, 2]]), length)
