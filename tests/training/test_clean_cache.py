"""Clean texts that are kept over epochs: the same losses and gradients, less to read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cllm
from cllm import ConsistencyConfig
from cllm.training.clean_cache import CleanCache
from cllm.training.packing import ConsistencyCollator
from cllm.training.sampling import SampledDataset
from tests.training.definition import random_example
from tests.training.exact import FAMILIES, exact_model
from tests.training.gated_definition import adapted

from .runs import assert_same_parameters, losses, parameters

CONFIG = ConsistencyConfig(
    gated=True, sampling="visited", states=3, window_size=(3, 5), clean_cache_gib=1.0
)
RESPONSES = (11, 6, 14)


def dataset(config=CONFIG) -> SampledDataset:
    examples = [random_example(seed, 2 + seed, length) for seed, length in enumerate(RESPONSES)]
    return SampledDataset(examples, config, seed=2)


def steps(config, family, groups, samples_per_row=1):
    """Losses and gradients of batches of the responses `groups`; the cache, if there is one."""
    model = exact_model(family)
    torch.manual_seed(0)  # of the adapters' A
    wrapped = adapted(model, family)
    gate = cllm.patch_training(wrapped, config)._gate
    collator = ConsistencyCollator(
        config, samples_per_row=samples_per_row, column_multiple=8, row_multiple=4
    )
    data, found = dataset(config), []
    for epoch, group in enumerate(groups):
        data.set_epoch(epoch)
        wrapped.zero_grad(set_to_none=True)
        loss = wrapped(**collator([data[index] for index in group])).loss
        loss.backward()
        gradients = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    return found, gate.texts


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_texts_give_the_same_losses_and_gradients(family):
    groups = [[0, 1], [2], [1, 2], [0], [2, 0, 1]]  # other neighbours, so other padding
    read, nothing = steps(replace(CONFIG, clean_cache_gib=0.0), family, groups)
    kept, cache = steps(CONFIG, family, groups)
    assert nothing is None and (cache.misses, cache.hits) == (3, 6)
    for (loss, gradients), (expected, wanted) in zip(kept, read, strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert gradients.keys() == wanted.keys() and len(gradients) > 2
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-14)


def test_a_full_cache_keeps_what_it_has():
    _, whole = steps(CONFIG, "llama", [[0], [1], [2]])
    room = whole.nbytes - 1  # for two of the three
    _, cache = steps(replace(CONFIG, clean_cache_gib=room / 2**30), "llama", [[0], [1], [2]] * 2)
    assert 0 < cache.nbytes <= room
    assert (cache.misses, cache.hits) == (4, 2)


def test_rows_of_several_responses_are_not_kept():
    _, cache = steps(CONFIG, "llama", [[0, 1, 2], [0, 1, 2]], samples_per_row=3)
    assert (cache.misses, cache.hits, cache.nbytes) == (2, 0, 0)


def test_a_part_of_a_batch_in_the_cache_is_not_enough():
    _, cache = steps(CONFIG, "llama", [[0], [0, 1], [0, 1]])
    assert (cache.misses, cache.hits) == (3, 2)


def test_the_bytes_are_those_of_the_texts():
    _, cache = steps(CONFIG, "llama", [[0, 2]])
    config = exact_model("llama").config
    tokens = sum(2 + index + RESPONSES[index] - 1 for index in (0, 2))
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert cache.nbytes == 8 * tokens * (config.hidden_size + 2 * config.num_hidden_layers * heads)
    assert isinstance(cache, CleanCache)


def test_training_is_the_same_with_the_cache(make_trainer):
    settings = {
        "gated": True,
        "lora_r": 4,
        "sampling": "visited",
        "window_size": [4, 6],
        "states": 4,
        "max_steps": 12,
        "stop_on_quality": False,
        "per_device_train_batch_size": 4,
    }
    without, with_cache = make_trainer(**settings), make_trainer(**settings, clean_cache_gib=0.1)
    for trainer in (without, with_cache):
        trainer.train()
    found, expected = torch.tensor(losses(with_cache)), torch.tensor(losses(without))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert_same_parameters(parameters(without), parameters(with_cache), 1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_cache_gib": 1.0}, "clean_cache_gib .* needs gated=True"),
        ({"gated": True, "clean_cache_gib": -1.0}, "clean_cache_gib must be 0 or more, not -1.0"),
        ({"gated": True, "clean_cache_gib": float("inf")}, "clean_cache_gib must be 0 or more"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**settings)
