"""``compile="inductor"``: the same texts from forwards that are compiled once."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import cllm
import cllm_kernels
from cllm.decoding import inductor

from .tiny_models import fresh_model, prompts

INPUTS = prompts([12, 5])


class Lowered:
    """Takes the graphs that inductor would be given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run

    @property
    def block_linears(self) -> int:
        wanted = torch.ops.cllm_kernels.block_linear.default
        return sum(node.target is wanted for graph in self.graphs for node in graph.graph.nodes)


@pytest.fixture
def lowered(monkeypatch) -> Lowered:
    """What is traced is not compiled, which would take seconds for every shape."""
    found = Lowered()
    monkeypatch.setattr(inductor, "_lowered", found)
    return found


def decoded(model: Any, inputs: Any = INPUTS, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(max_new_tokens=20, do_sample=False, block_size=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile='inductor'")
        return cllm.generate(model, **inputs, **(settings | {"compile": "inductor"} | changes))


@pytest.mark.parametrize("family", ["gemma3", "gpt-neox", "gpt-oss", "deepseek-v3", "llama"])
def test_the_text_is_greedy_search(lowered, family):
    model = fresh_model(family)
    expected = model.generate(**INPUTS, max_new_tokens=20, do_sample=False)
    assert torch.equal(decoded(model), expected)
    assert len(lowered.graphs) == 1 and lowered.runs > 1
    # another call, and a shorter one, of the same shape
    assert torch.equal(decoded(model), expected)
    short = decoded(model, max_new_tokens=9)
    assert torch.equal(short, expected[:, : short.shape[1]])
    assert len(lowered.graphs) == 1


@pytest.mark.parametrize("family", ["gpt-neox", "gpt2"])
def test_every_linear_layer_of_few_rows_is_block_linear(lowered, family):
    model = fresh_model(family)
    expected = model.generate(**INPUTS, max_new_tokens=20, do_sample=False)
    assert torch.equal(decoded(model), expected)
    linears = [one for one in model.modules() if type(one) in (torch.nn.Linear, Conv1D)]
    assert lowered.block_linears == len(linears) > 8
    lowered.graphs.clear()
    decoded(model, block_size=40)  # 80 rows
    assert lowered.graphs and lowered.block_linears == 0


def test_layers_share_no_memory(lowered, monkeypatch):
    """Inputs that share memory and are written to are copied whole, in every layer and forward."""
    seen, own = [], inductor._SeenCache

    def made(cache: Any) -> Any:
        seen.append(cache)
        return own(cache)

    monkeypatch.setattr(inductor, "_SeenCache", made)
    decoded(fresh_model("gemma3"))
    (cache,) = seen
    stored = [tensor for layer in cache.ragged for tensor in layer.stored()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in stored}) == len(stored) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "block"},
        {"candidates": 2},
        {"block_size": 1},
        {"record_trajectories": True},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "seed": 3, "temperature": 1.7},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options(lowered, changes):
    model = fresh_model("gemma3")
    assert torch.equal(decoded(model, **changes), decoded(model, **changes, compile="off"))
    assert lowered.runs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_windows_of_one_width_have_one_text_in_16_bits(lowered, dtype):
    model = fresh_model("gpt-neox").to(dtype)
    texts = [decoded(model, **changes) for changes in ({}, {"accept": "one"}, {"mode": "block"})]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_a_prompt_of_one_token(lowered):
    model, inputs = fresh_model("gemma3"), prompts([1])
    assert torch.equal(decoded(model, inputs), decoded(model, inputs, compile="off"))
    assert lowered.runs


def test_the_latest_shapes_are_kept_and_no_model_with_them(lowered, monkeypatch):
    monkeypatch.setattr(inductor, "MOST_KEPT", 2)
    model = fresh_model("gpt-neox")
    for size in (2, 3, 4, 4, 3):
        decoded(model, block_size=size)
    assert len(lowered.graphs) == 3
    decoded(model, block_size=2)
    assert len(lowered.graphs) == 4
    gone = weakref.ref(model)
    lowered.graphs.clear()
    del model
    gc.collect()
    assert gone() is None


def test_more_shapes_than_dynamo_compiles_of_one_function(lowered):
    model, sizes = fresh_model("gpt-neox"), (2, 3, 4, 5)
    with torch._dynamo.config.patch(recompile_limit=2):
        texts = [decoded(model, block_size=size) for size in sizes]
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert len(lowered.graphs) == len(sizes)


def test_what_cannot_be_compiled_goes_on_as_it_is(monkeypatch):
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(inductor, "_lowered", fails)
    model = fresh_model("gemma3")
    expected = model.generate(**INPUTS, max_new_tokens=20, do_sample=False)
    wanted: dict[str, Any] = dict(max_new_tokens=20, do_sample=False, compile="inductor")
    message = r"could not be compiled .*\(RuntimeError: no compiler\)"
    with pytest.warns(UserWarning, match=message) as caught:
        found = cllm.generate(model, **INPUTS, **wanted, block_size=3)
    assert len(caught) == 1
    assert torch.equal(found, expected)
    # nobody is told twice, and nothing is tried again
    monkeypatch.setattr(inductor, "_lowered", None)
    assert torch.equal(decoded(model), expected)


def test_autocast_is_not_compiled(lowered):
    model = fresh_model("gemma3")
    wanted: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, block_size=3)
    decoded(model)  # finds the layout
    lowered.runs = 0
    with torch.autocast("cpu", torch.bfloat16):
        expected = cllm.generate(model, **INPUTS, **wanted, compile="off")
        with pytest.warns(UserWarning, match="autocast is on"):
            found = cllm.generate(model, **INPUTS, **wanted, compile="inductor")
    assert torch.equal(found, expected) and not lowered.runs


def test_what_is_not_compiled_has_the_linear_layers_of_few_rows(monkeypatch):
    """Prompts, and forwards whose compilation failed."""
    rows: list[int] = []
    own = cllm_kernels.block_linear

    def counted(x: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(x.numel() // x.shape[-1])
        return own(x, *args, **kwargs)

    monkeypatch.setattr(cllm_kernels, "block_linear", counted)
    monkeypatch.setattr(inductor, "_lowered", None)
    with pytest.warns(UserWarning, match="could not be compiled"):
        cllm.generate(
            fresh_model("gpt-neox"), **INPUTS, max_new_tokens=9, do_sample=False, block_size=3,
            compile="inductor",
        )  # fmt: skip
    assert {22, 6} <= set(rows)  # two prompts of up to 11 tokens, two windows of 3


def test_layouts_that_follow_the_text_are_not_compiled(lowered):
    model = fresh_model("bloom")
    expected = model.generate(**INPUTS, max_new_tokens=12, do_sample=False)
    with pytest.warns(UserWarning, match="its layout is right-aligned"):
        found = cllm.generate(
            model, **INPUTS, max_new_tokens=12, do_sample=False, compile="inductor"
        )
    assert torch.equal(found, expected) and not lowered.graphs


def test_what_does_not_go_together():
    model = fresh_model("llama")
    with pytest.raises(ValueError, match="block_size='auto' times windows of many sizes"):
        cllm.JacobiConfig(compile="inductor", block_size="auto")
    adapter = cllm.GatedAdapter.random(model, 2)
    with pytest.raises(ValueError, match="does not know the rows that an adapter guesses in"):
        decoded(model, adapter=adapter)
    with pytest.raises(ValueError, match="does not know the rows that an adapter guesses in"):
        cllm.patch(model, cllm.JacobiConfig(compile="inductor"), adapter=adapter)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"torch.compile was at this one already"):
        decoded(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt-neox", "gemma3", "gpt2"])
def test_the_text_of_inductor_itself(family):
    model = fresh_model(family)
    expected = model.generate(**INPUTS, max_new_tokens=20, do_sample=False)
    assert torch.equal(decoded(model), expected)
