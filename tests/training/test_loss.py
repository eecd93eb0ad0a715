"""The packed loss and its gradients are those of the definition, with a forward for every state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cllm
from cllm import ConsistencyConfig
from cllm.training.packing import ConsistencyCollator
from tests.training.definition import (
    defined_loss,
    defined_sums,
    every_state,
    first_states,
    random_example,
)
from tests.training.exact import FAMILIES, exact_model

pytestmark = pytest.mark.usefixtures("exact_softmax")

CONFIG = ConsistencyConfig(ar_weight=0.7)


def batch_of(samples, config=CONFIG, **settings):
    return ConsistencyCollator(config, column_multiple=8, row_multiple=4, **settings)(samples)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_defined(model, samples, config, batch, teacher=None):
    expected = defined_loss(model, samples, config, teacher)
    expected_gradients = gradients(model, expected)
    handle = cllm.patch_training(model, config)
    try:
        output = model(**batch)
        found = gradients(model, output.loss)
    finally:
        handle.remove()
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=1e-12)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    return output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("consistency", ["global", "local"])
def test_loss_and_gradients_are_the_definitions(family, consistency):
    config = replace(CONFIG, consistency=consistency)
    samples = [
        every_state(random_example(1)),
        first_states(random_example(2, prompt=3, response=9)),
        every_state(random_example(3, prompt=1, response=6, block_size=8)),
    ]
    batch = batch_of(samples, config, samples_per_row=2)
    assert len(batch["input_ids"]) == 2
    output = assert_as_defined(exact_model(family), samples, config, batch)
    _, _, rows, _ = defined_sums(exact_model(family), samples, config)
    assert int(output.tokens) == rows > 20


def test_eager_attention_gives_the_same():
    samples = [every_state(random_example(1))]
    assert_as_defined(exact_model("llama", "eager"), samples, CONFIG, batch_of(samples))


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.3},
        {"temperature": 2.5},
        {"label_smoothing": 0.0},
        {"ar_weight": 0.0},
        {"recompute": True},
        {"chunk_tokens": 4},
    ],
    ids=str,
)
def test_every_setting_of_the_loss(changes):
    config = replace(CONFIG, **changes)
    samples = [every_state(random_example(4)), first_states(random_example(5))]
    assert_as_defined(exact_model(), samples, config, batch_of(samples, config))
