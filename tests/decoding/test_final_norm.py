"""A model's final norm through the op, which native layers bring along."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import cllm
import cllm_kernels
from cllm.decoding import layers
from cllm.decoding.final_norm import NativeNorm
from cllm.decoding.graph_key import watched
from cllm.decoding.layouts import Layout

from .test_gated import greedy, random_adapter
from .test_native_layers import FAMILIES, needs_native
from .tiny_models import prompts, tiny_model

pytestmark = needs_native
NATIVE = Layout(False, "native")


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of the op has had."""
    rows, own = [], cllm_kernels.rms_norm

    def count(x, *args, **kwargs):
        rows.append(x.shape[:-1].numel())
        return own(x, *args, **kwargs)

    monkeypatch.setattr(cllm_kernels, "rms_norm", count)
    return rows


def untouched(model):
    return all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_the_same(family, dtype, calls, monkeypatch):
    model, inputs = copy.deepcopy(tiny_model(family, dtype)), prompts([23, 1, 12])
    settings = {"max_new_tokens": 40, "block_size": 6}
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_norms", lambda model: [])
        wanted = cllm.generate(model, **inputs, **settings)
    assert not calls
    for changes in ({}, {"adapter": random_adapter(family, 0.05), "verify_size": 3}):
        calls.clear()
        out = cllm.generate(model, **inputs, **settings, **changes, return_dict_in_generate=True)
        assert torch.equal(out.sequences, wanted)
        assert len(calls) >= out.forwards  # and the probe's
        assert untouched(model)


def hooked(model, heard):
    model.model.norm.register_forward_hook(lambda *_: heard.append(1))


def hooked_before(model, heard):
    model.model.norm.register_forward_pre_hook(lambda *_: heard.append(1))


def replaced(model, heard):
    own = model.model.norm.forward

    def forward(hidden_states):
        heard.append(1)
        return own(hidden_states)

    model.model.norm.forward = forward


def of_another_class(model, heard):
    class Norm(type(model.model.norm)):
        def forward(self, hidden_states):
            heard.append(1)
            return super().forward(hidden_states)

    model.model.norm.__class__ = Norm


@pytest.mark.parametrize(
    "change", [hooked, hooked_before, replaced, of_another_class], ids=lambda one: one.__name__
)
def test_whoever_changed_the_norm_keeps_it(change, calls):
    model, inputs, heard = copy.deepcopy(tiny_model("llama")), prompts([9, 4]), []
    change(model, heard)
    expected, own = greedy(model, inputs, max_new_tokens=16), model.model.norm.forward
    heard.clear()
    out = cllm.generate(
        model, **inputs, max_new_tokens=16, block_size=6, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, expected)
    assert not calls and len(heard) >= out.forwards
    assert model.model.norm.forward == own


def test_the_last_of_several_calls_puts_it_back(calls):
    model, other = (copy.deepcopy(tiny_model("llama")) for _ in range(2))
    norm = other.model.norm = model.model.norm
    own = norm.forward
    with NATIVE.applied(model):
        ours = norm.forward
        assert isinstance(ours.__self__, NativeNorm) and ours.__self__.own == own
        for inner in (model, other):
            with NATIVE.applied(inner):
                assert norm.forward == ours
            assert norm.forward == ours
        with pytest.raises(KeyError), NATIVE.applied(other):
            raise KeyError
        assert norm.forward == ours
    assert norm.forward == own and untouched(model) and untouched(other)


def test_it_is_put_back_after_concurrent_calls(calls):
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9])
    expected = greedy(model, inputs, max_new_tokens=30)
    found = []

    def decode():
        for _ in range(3):
            found.append(cllm.generate(model, **inputs, max_new_tokens=30))

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9 and all(torch.equal(one, expected) for one in found)
    assert calls and untouched(model)


def test_a_hook_that_comes_meanwhile_is_heard_and_all_is_put_back():
    model, inputs, heard = copy.deepcopy(tiny_model("llama")), prompts([9]), []
    with NATIVE.applied(model):
        hooked(model, heard)
        cllm.generate(model, **inputs, max_new_tokens=8)
    assert heard and untouched(model)


def test_it_is_not_taken_for_somebody_elses():
    model = copy.deepcopy(tiny_model("llama"))
    with NATIVE.applied(model):
        assert "forward" in model.model.norm.__dict__ and not watched(model)
    replaced(model, [])
    assert watched(model)


def test_new_weights_are_read_and_other_dtypes_left_to_the_module(calls):
    norm = copy.deepcopy(tiny_model("llama")).model.norm
    native, x = NativeNorm(norm), torch.randn(2, 3, norm.weight.shape[0])
    with torch.no_grad():
        assert torch.equal(native.forward(x), norm(x))
        norm.weight.data = torch.rand_like(norm.weight)
        assert torch.equal(native.forward(x), norm(x))
        assert calls == [6, 6]
        assert torch.equal(native.forward(x.bfloat16()), norm(x.bfloat16()))  # fp32
        norm.double()
        assert torch.equal(native.forward(x.double()), norm(x.double()))
        assert calls == [6, 6]
