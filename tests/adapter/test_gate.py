"""The gate adds LoRA to the rows behind it, and does not touch a bit of the others."""

from __future__ import annotations

import threading

import pytest
import torch

from cllm import GatedAdapter
from cllm.adapter.peft_model import adapters_off

from ..decoding.tiny_models import fresh_model, prompts, tiny_model
from .adapters import digest, peft_model


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "phi"])
def test_open_from_the_first_column_it_is_peft(family):
    """Conv1D weights, fused projections and flattened inputs among them."""
    peft = peft_model(family, torch.float64)
    ids = prompts([7, 7])["input_ids"]
    with_adapter, without = logits_of(peft, ids), logits_of(tiny_model(family, torch.float64), ids)
    base = tiny_model(family, torch.float64)
    adapter = GatedAdapter.from_peft(peft, metadata={"gated": True})
    for _ in range(2):
        with adapter.applied(base) as gate:
            assert torch.equal(logits_of(base, ids), without)
            for _ in range(2):  # the second one shares products
                with gate.open(0, 2, 7):
                    found = logits_of(base, ids)
                torch.testing.assert_close(found, with_adapter, rtol=1e-10, atol=1e-10)
                assert not torch.allclose(found, without, rtol=1e-3)
                assert torch.equal(logits_of(base, ids), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_before_the_gate_keep_their_bits(dtype):
    # causal attention: no row sees a later one, so nothing but the hook could change them
    model = tiny_model("llama", dtype)
    ids = prompts([9, 9])["input_ids"]
    plain = logits_of(model, ids)
    with (
        GatedAdapter.random(model, 4, scale=1.0).applied(model) as gate,
        gate.open(4, 2, 9),
    ):
        found = logits_of(model, ids)
    assert torch.equal(found[:, :4], plain[:, :4])
    assert not torch.isclose(found[:, 4:], plain[:, 4:]).all(dim=-1).any()


def test_hooks_are_gone_after_an_exception():
    model = fresh_model()
    before = digest(model)
    with (
        pytest.raises(KeyError),
        GatedAdapter.random(model, 2).applied(model) as gate,
        gate.open(0, 1, 1),
    ):
        raise KeyError("whatever")
    assert gate.rows() is None
    assert not any(module._forward_hooks for module in model.modules())
    assert digest(model) == before


def test_the_gate_is_open_for_its_own_thread_only():
    model = tiny_model("llama")
    ids = prompts([6])["input_ids"]
    plain, found = logits_of(model, ids), []
    with (
        GatedAdapter.random(model, 2, scale=1.0).applied(model) as gate,
        gate.open(0, 1, 6),
    ):
        other = threading.Thread(target=lambda: found.append(logits_of(model, ids)))
        other.start()
        other.join()
        here = logits_of(model, ids)
    assert torch.equal(found[0], plain)
    assert not torch.allclose(here, plain)


def test_a_peft_models_own_adapters_are_off_and_come_back():
    peft = peft_model()
    ids = prompts([6])["input_ids"]
    active, plain = logits_of(peft, ids), logits_of(tiny_model("llama"), ids)
    trainable = [parameter.requires_grad for parameter in peft.parameters()]
    with adapters_off(peft):
        with adapters_off(peft):
            assert torch.equal(logits_of(peft, ids), plain)
        assert torch.equal(logits_of(peft, ids), plain)
    assert torch.equal(logits_of(peft, ids), active)
    assert trainable == [parameter.requires_grad for parameter in peft.parameters()]


def test_live_weights_are_those_of_the_moment():
    peft = peft_model()
    adapter = GatedAdapter.from_peft(peft, metadata={"gated": True})
    ids = prompts([6])["input_ids"]

    def gated():
        with adapter.applied(peft) as gate, gate.open(0, 1, 6):
            return logits_of(peft, ids)

    torch.testing.assert_close(gated(), logits_of(peft, ids))
    before = gated()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2.0)
    torch.testing.assert_close(gated(), logits_of(peft, ids))
    assert not torch.allclose(gated(), before)
