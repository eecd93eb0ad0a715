"""The head by itself gives the model's own logits, or is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

from cllm.head import LanguageHead
from cllm.traits import UnsupportedModelError
from tests.decoding.tiny_models import _BASE, CONFIGS, VOCAB, fresh_model, tiny_model

TOKENS = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))


def scaled_model(family: str) -> torch.nn.Module:
    config = {
        "cohere": lambda: hf.CohereConfig(**_BASE, logit_scale=0.25),
        "granite": lambda: hf.GraniteConfig(**_BASE, logits_scaling=8.0),
    }[family]()
    torch.manual_seed(1)
    return hf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", CONFIGS)
def test_gives_the_models_own_logits(family):
    model = tiny_model(family)
    head = LanguageHead.of(model)
    with torch.no_grad():
        hidden = head.hidden_states(input_ids=TOKENS)
        expected = model(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-4, atol=1e-4)
        assert head.argmax(hidden.flatten(0, 1)).tolist() == expected.argmax(-1).flatten().tolist()


@pytest.mark.parametrize(("family", "scale"), [("cohere", 0.25), ("granite", 0.125)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finds_the_scale_and_whether_it_multiplies_or_divides(family, scale, dtype):
    head = LanguageHead.of(scaled_model(family).to(dtype))
    assert (head.scale, head.softcap) == (scale, None)


def test_finds_the_soft_cap():
    assert LanguageHead.of(tiny_model("gemma2", torch.float64)).softcap == 30.0


def test_checks_once_a_model_and_leaves_it_as_it_was():
    model = fresh_model("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    head = LanguageHead.of(model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert LanguageHead.of(model) is head
    assert LanguageHead.of(copy.deepcopy(model)).model is not model


def test_looks_through_wrappers():
    peft = pytest.importorskip("peft")
    model = fresh_model("llama")
    assert LanguageHead.of(torch.compile(model, backend="eager")).model is model
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert LanguageHead.of(wrapped).model is model


def test_uses_the_head_that_peft_trains_beside_the_original():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(fresh_model("llama"), settings)
    head = LanguageHead.of(wrapped)
    assert head.weight.requires_grad
    with torch.no_grad():
        head.weight.mul_(2)
        hidden = head.hidden_states(input_ids=TOKENS)
        expected = wrapped(input_ids=TOKENS).logits
    torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-4, atol=1e-4)


def test_refuses_a_head_that_its_weight_alone_does_not_make():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        fresh_model("llama"), peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    )
    with pytest.raises(UnsupportedModelError, match="leave it out of target_modules"):
        LanguageHead.of(wrapped)


def test_refuses_a_model_that_does_something_else_to_its_logits():
    model = fresh_model("llama")
    forward = model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, VOCAB)
        return output

    model.forward = shifted
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: its logits are not those"):
        LanguageHead.of(model)


def test_refuses_what_is_no_language_model():
    with pytest.raises(UnsupportedModelError, match="from_pretrained"):
        LanguageHead.of(torch.nn.Linear(2, 2))
    config = CONFIGS["llama"]()
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        LanguageHead.of(hf.AutoModel.from_config(config))


def test_takes_the_dtype_of_autocast():
    head = LanguageHead.of(tiny_model("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, weight, _ = head.operands(torch.randn(3, 32))
    assert hidden.dtype == weight.dtype == torch.bfloat16
