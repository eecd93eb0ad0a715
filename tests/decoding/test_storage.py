"""The layers' storage in few tensors, and the tokens that move in them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from cllm.decoding import cache as module
from cllm.decoding.cache import BlockPlan, RaggedCache
from cllm.decoding.storage import Storage, moved, storage_for

from .test_gated import greedy
from .test_graphs import graphed, recorder  # noqa: F401, a fixture
from .tiny_models import prompts, tiny_model


def filled(storage, layers=3, widths=((2, 8), (1, 5))):
    """A cache whose layers have keys and values of these heads and sizes, all numbers different."""
    plan = BlockPlan(2, 16, torch.device("cpu"), constant_view=True, storage=storage)
    plan.start_prefill(9)
    cache = RaggedCache(plan)
    numbers = iter(range(1 << 20))
    for index in range(layers):
        states = [
            torch.tensor([next(numbers) for _ in range(2 * heads * 9 * size)])
            .float()
            .view(2, heads, 9, size)
            for heads, size in widths
        ]
        cache.layer(index).update(*states)
    return cache


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_one_move_is_that_of_every_layer(layers):
    """With room for too few, for all and for more of them."""
    alone, together = filled(None), filled(Storage(layers))
    source, target = torch.tensor([[5, 6], [2, 7]]), torch.tensor([[1, 2], [8, 4]])
    together.move(source, target)
    alone.move(source, target)
    for one, other in zip(alone.layers, together.layers, strict=True):
        for mine, theirs in zip(one.stored(), other.stored(), strict=True):
            assert torch.equal(mine, theirs)
    assert together.nbytes == alone.nbytes
    whole = together.plan.storage.whole
    assert (whole is None) == (layers == 2)


def test_layers_that_differ_have_their_own():
    storage = Storage(2)
    states = torch.zeros(2, 3, 0, 4)
    first = storage.take("keys", states, 8)
    assert first.shape == (2, 8, 3, 4) and len(storage.whole) == 1
    other = storage.take("keys", torch.zeros(2, 1, 0, 4), 8)
    assert other.shape == (2, 8, 1, 4) and storage.whole is None
    assert storage.take("keys", states, 8).data_ptr() == first.data_ptr() + first.nbytes


def test_moved_in_one_and_in_many():
    many = torch.randn(3, 2, 8, 1, 4)
    source, target = torch.tensor([[4, 5], [6, 7]]), torch.tensor([[0, 1], [2, 0]])
    expected = many.clone()
    for layer in expected:
        for row in range(2):
            layer[row, target[row]] = layer[row, source[row]].clone()
    found = many.clone()
    moved(found, source, target)
    assert torch.equal(found, expected)
    for layer in many:
        moved(layer, source, target)
    assert torch.equal(many, expected)


def test_models_say_how_many_layers_they_have():
    for family in ("llama", "gpt2"):
        states = torch.zeros(1, 1, 0, 1)
        storage = storage_for(tiny_model(family))
        for _ in range(3):
            storage.take("keys", states, 4)
        assert storage.whole is not None
        storage.take("keys", states, 4)
        assert storage.whole is None


def test_who_shares_keys_and_values_has_none_of_its_own():
    def model(devices=("cpu",), **config):
        text = SimpleNamespace(num_hidden_layers=4, **config)
        return SimpleNamespace(
            config=SimpleNamespace(get_text_config=lambda: text),
            parameters=lambda: [torch.empty(1, device=device) for device in devices],
        )

    assert storage_for(model())._layers == 4
    assert storage_for(model(num_kv_shared_layers=3))._layers == 1
    # one device would hold the layers of all
    assert storage_for(model(devices=("cpu", "meta"))) is None
    unknown = model()
    del unknown.config.get_text_config().num_hidden_layers
    assert storage_for(unknown) is None


def test_a_captured_call_moves_all_layers_at_once(recorder, monkeypatch):  # noqa: F811
    shapes, own = [], module.moved
    monkeypatch.setattr(
        module, "moved", lambda *given: shapes.append(given[0].dim()) or own(*given)
    )
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    found = graphed(model, inputs, max_new_tokens=30, candidates=3)
    assert torch.equal(found.sequences, greedy(model, inputs, max_new_tokens=30))
    assert set(shapes) == {5} and len(shapes) % 2 == 0
