"""One product for modules that read one input, and for no others."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from cllm import GatedAdapter, linears
from cllm.adapter import Gate
from cllm.adapter.low_rank import LowRankRows
from cllm.adapter.weights import LowRank

from ..decoding.tiny_models import prompts, tiny_model

IN, OUT = 6, 5


class Rows:
    """Linear modules behind hooks, and what they should give."""

    def __init__(self, ranks, dtype=torch.float64):
        torch.manual_seed(0)
        self.gate = Gate()
        self.rows = LowRankRows(self.gate)
        self.modules, self.pairs = [], []
        for number, rank in enumerate(ranks):
            module = torch.nn.Linear(IN, OUT).to(dtype)
            a, b = torch.randn(rank, IN, dtype=dtype), torch.randn(OUT, rank, dtype=dtype)
            module.register_forward_hook(
                self.rows.hook(str(number), LowRank(a, b, 1.0), module.weight)
            )
            self.modules.append(module)
            self.pairs.append((a, b))

    def expected(self, number, x, first):
        a, b = self.pairs[number]
        module = self.modules[number]
        plain = torch.nn.functional.linear(x, module.weight, module.bias)
        gated = plain + x @ a.t() @ b.t()
        return torch.cat([plain[:, :first], gated[:, first:]], dim=1)

    def run(self, numbers, x, first):
        batch, width = x.shape[:2]
        with torch.no_grad(), self.gate.open(first, batch, width):
            for number in numbers:
                found = self.modules[number](x)
                torch.testing.assert_close(found, self.expected(number, x, first))


def count_products(monkeypatch):
    from cllm.adapter import low_rank

    calls, product = [], low_rank._product
    monkeypatch.setattr(low_rank, "_product", lambda *given: calls.append(1) or product(*given))
    return calls


@pytest.mark.parametrize("batch", [1, 3])
def test_products_are_shared_from_the_second_forward_on(monkeypatch, batch):
    rows, calls = Rows([2, 3, 4, 2]), count_products(monkeypatch)
    x, y = torch.randn(2, batch, 4, IN, dtype=torch.float64)

    def forward():
        rows.run([0, 1, 2], x, 1)
        rows.run([3], y, 1)

    forward()
    assert len(calls) == 4 and rows.rows.groups is None
    forward()
    assert rows.rows.groups == (("0", "1", "2"),)
    assert len(calls) == 4 + 2
    forward()
    assert len(calls) == 4 + 2 + 2


def test_another_input_is_never_taken_for_the_shared_one():
    rows = Rows([2, 3])
    x, y = torch.randn(2, 1, 4, IN, dtype=torch.float64)
    for _ in range(2):
        rows.run([0, 1], x, 1)
    assert rows.rows.groups == (("0", "1"),)
    rows.run([0], x, 1)
    rows.run([1], y, 1)  # another tensor
    rows.run([0], x, 1)
    rows.run([1], x.clone(), 1)  # equal, but not the same
    rows.run([0], x, 1)
    rows.run([1], x, 2)  # other rows
    rows.run([0], x, 1)
    x.mul_(-2.0)  # changed in place
    rows.run([1], x, 1)
    rows.run([1, 0, 1], y, 1)  # another order
    with torch.inference_mode():
        z = torch.randn(1, 4, IN, dtype=torch.float64)
        rows.run([0, 1], z, 1)
        z.mul_(-2.0)
        rows.run([1], z, 1)


def test_a_module_that_runs_twice_in_a_forward():
    rows = Rows([2, 2, 2])
    x, y = torch.randn(2, 1, 3, IN, dtype=torch.float64)
    for _ in range(3):
        rows.run([0, 1], x, 1)
        rows.run([0, 1, 2], y, 1)
    assert rows.rows.groups == (("0", "1"),)


def test_other_dtypes_stand_alone():
    rows = Rows([2, 2])
    rows.modules[1].to(torch.float32)
    x = torch.randn(1, 3, IN, dtype=torch.float64)
    rows.rows._parts["1"].a = rows.rows._parts["1"].a.float()
    rows.run([0], x, 1)
    with torch.no_grad(), rows.gate.open(1, 1, 3):
        rows.rows._look(rows.rows._parts["1"], x)
        rows.rows._look(rows.rows._parts["0"], x)
    assert rows.rows.groups == ()


def test_of_a_real_model_they_are_kept_for_the_next_call():
    model = tiny_model("llama")
    adapter = GatedAdapter.random(model, 2, scale=0.5)
    ids = prompts([6])["input_ids"]

    def logits(times):
        with torch.no_grad(), adapter.applied(model) as gate, gate.open(2, 1, 6):
            return [model(input_ids=ids, use_cache=False).logits for _ in range(times)]

    found = logits(2)
    layers = model.config.num_hidden_layers
    assert adapter._groups[model] == tuple(
        tuple(f"model.layers.{layer}.{block}.{part}_proj" for part in parts)
        for layer in range(layers)
        for block, parts in (("self_attn", "qkv"), ("mlp", ("gate", "up")))
    )
    for later in (found[1], *logits(2)):
        torch.testing.assert_close(later, found[0])
        assert torch.equal(later[:, :2], found[0][:, :2])


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_inference_mode_gives_the_same(mode):
    model = tiny_model("llama", torch.float64)
    adapter = GatedAdapter.random(model, 2, scale=0.5)
    ids = prompts([6])["input_ids"]

    def logits():
        with adapter.applied(model) as gate, gate.open(0, 1, 6):
            return [model(input_ids=ids, use_cache=False).logits for _ in range(3)]

    with torch.no_grad():
        expected = logits()[0]
    with mode(), torch.no_grad():
        for found in logits():
            torch.testing.assert_close(found, expected)


def fused(casts, ranks, seed=0):
    """Terms of modules called 0, 1, ... that share casts."""
    torch.manual_seed(seed)
    rows, like = LowRankRows(Gate()), torch.empty(OUT, IN, dtype=torch.bfloat16)
    pairs = [LowRank(torch.randn(rank, IN), torch.randn(OUT, rank), 2.0) for rank in ranks]
    return [rows.term(casts, str(number), pair, like) for number, pair in enumerate(pairs)], pairs


def below(terms):
    """Whether their a lie below each other."""
    matrices = [term.low_rank[0] for term in terms]
    place = matrices[0].data_ptr()
    for matrix in matrices:
        if matrix.data_ptr() != place:
            return False
        place += matrix.nbytes
    return True


def test_matrices_of_one_input_lie_below_each_other():
    casts = {}
    terms, pairs = fused(casts, (3, 5, 2))
    before = [term.low_rank for term in terms]
    assert not below(terms)
    terms[0].lay_above(terms[1:])
    assert below(terms)
    for term, (a, b), pair in zip(terms, before, pairs, strict=True):
        assert torch.equal(term.low_rank[0], a) and term.low_rank[1] is b
        assert term.low_rank[0].is_contiguous() and a.shape == pair.a.shape
    places = [term.low_rank[0].data_ptr() for term in terms]
    terms[0].lay_above(terms[1:])
    assert places == [term.low_rank[0].data_ptr() for term in terms]
    # in the next call, too
    again, _ = fused(casts, (3, 5, 2))
    assert places == [term.low_rank[0].data_ptr() for term in again]


def test_what_has_changed_since_is_made_anew():
    casts = {}
    terms, pairs = fused(casts, (3, 5))
    terms[0].lay_above(terms[1:])
    own = LowRankRows(Gate())
    like = torch.empty(OUT, IN, dtype=torch.bfloat16)
    pairs[1].a.mul_(2)
    again = [own.term(casts, str(number), pair, like) for number, pair in enumerate(pairs)]
    assert torch.equal(again[1].low_rank[0], pairs[1].a.bfloat16())
    assert not below(again)
    again[0].lay_above(again[1:])
    assert below(again) and torch.equal(again[1].low_rank[0], pairs[1].a.bfloat16())
    # what the first call works with, or a capture of it, is as it was
    assert below(terms) and torch.equal(2 * terms[1].low_rank[0], again[1].low_rank[0])


def test_layers_on_a_gpu_ask_for_it(monkeypatch):
    from cllm.decoding.layers import NativeLayer

    model = tiny_model("llama")
    layer = model.model.layers[0]
    adapter = GatedAdapter.random(model, 4, scale=0.05)
    native = NativeLayer(layer, 0, None)
    for on_cpu in (True, False):
        monkeypatch.setattr(NativeLayer, "on_cpu", on_cpu)
        with adapter.applied(model) as gate, gate.open(1, 1, 3):
            terms = [linears._terms[one][0] for one in native.linears]
            weights, first = native.with_terms(torch.Size([1, 3]))
            assert first == 1
            for group in (terms[:3], terms[4:6]):
                assert below(group) is not on_cpu
            for term, pair in zip(terms, weights.low_rank, strict=True):
                assert pair[0] is term.low_rank[0]
