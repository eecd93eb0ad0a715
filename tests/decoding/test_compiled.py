"""Models that `torch.compile` was at are decoded, and are as compiled behind it as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cllm
from cllm.uncompiled import uncompiled

from .tiny_models import fresh_model, prompts, tiny_model

INPUTS = prompts([12, 5])


class Backend:
    """Counts what it is given to compile and what of that is run."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


def in_place(model: Any, backend: Any) -> None:
    model.compile(backend=backend)


def whole_graph(model: Any, backend: Any) -> None:
    model.compile(backend=backend, fullgraph=True)


def forward(model: Any, backend: Any) -> None:
    model.forward = torch.compile(model.forward, backend=backend)


def layers(model: Any, backend: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend=backend)


def wrapped_part(model: Any, backend: Any) -> None:
    model.model = torch.compile(model.model, backend=backend)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("compiled", [in_place, whole_graph, forward, layers, wrapped_part])
def test_the_text_of_a_compiled_model(compiled, family):
    expected = tiny_model(family).generate(**INPUTS, max_new_tokens=20, do_sample=False)
    model, backend = fresh_model(family), Backend()
    compiled(model, backend)
    for changes in ({}, {"block_size": 1}, {"compile": "off"}, {"candidates": 2}):
        found = cllm.generate(model, **INPUTS, max_new_tokens=20, **changes)
        assert torch.equal(found, expected), changes
    # every width and length would be compiled for itself
    assert backend.compiled == 0


def test_a_model_is_compiled_behind_the_last_call():
    model, backend = fresh_model(), Backend()
    model.compile(backend=backend)
    with uncompiled(model):
        with uncompiled(model):
            model(**INPUTS)
        model(**INPUTS)
        with uncompiled(fresh_model()):  # not a matter of models that are not compiled
            model(**INPUTS)
    assert backend.runs == 0
    model(**INPUTS)
    assert backend.runs > 0


def test_a_wrapped_model_says_what_to_pass():
    wrapped = torch.compile(fresh_model(), backend="eager")
    message = "torch.compile has wrapped this LlamaForCausalLM; pass .* its _orig_mod"
    for call in (cllm.patch, lambda model: cllm.generate(model, **INPUTS, max_new_tokens=4)):
        with pytest.raises(cllm.UnsupportedModelError, match=message):
            call(wrapped)
    found = cllm.generate(wrapped._orig_mod, **INPUTS, max_new_tokens=4)
    assert found.shape == (2, 16)
