"""The packed loss and its gradients are those of the definition, with a forward for every state."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import cllm
from cllm import ConsistencyConfig
from cllm.training import packed_sample
from cllm.training.examples import BlockStates
from cllm.training.packing import ConsistencyCollator
from cllm.training.sampling import SampledDataset, SampledExample
from tests.decoding.tiny_models import tiny_model
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


def loss_of(model, batch, config=CONFIG):
    handle = cllm.patch_training(model, config)
    try:
        with torch.no_grad():
            return model(**batch)
    finally:
        handle.remove()


SAMPLES = [
    every_state(random_example(1)),
    first_states(random_example(2, prompt=3, response=9)),
    every_state(random_example(3, prompt=1, response=6, block_size=8)),
    every_state(random_example(4, prompt=2, response=1)),
]


def test_a_batch_of_many_is_the_mean_of_ones():
    model = exact_model()
    together = loss_of(model, batch_of(SAMPLES))
    alone = [loss_of(model, batch_of([sample])) for sample in SAMPLES]
    rows = [int(output.tokens) for output in alone]
    labels = [len(sample.example.response) for sample in SAMPLES]
    assert rows[-1] == 0 and labels[-1] == 1  # trains the autoregressive loss alone
    for name, counts in (("consistency_loss", rows), ("ar_loss", labels)):
        mean = sum(n * o[name] for n, o in zip(counts, alone, strict=True)) / sum(counts)
        torch.testing.assert_close(together[name], mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        together.loss, together.consistency_loss + CONFIG.ar_weight * together.ar_loss
    )


def test_samples_in_one_row_are_as_if_alone():
    model = exact_model("qwen2-local")
    one_row = batch_of(SAMPLES, samples_per_row=None, max_columns=200)
    assert len(one_row["input_ids"]) == 1
    packed, rows = loss_of(model, one_row), loss_of(model, batch_of(SAMPLES))
    for name in ("loss", "consistency_loss", "ar_loss"):
        torch.testing.assert_close(packed[name], rows[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("consistency", ["global", "local"])
def test_states_of_one_block_are_as_in_separate_calls(consistency):
    config = replace(CONFIG, consistency=consistency)
    model, sample = exact_model(), every_state(random_example(1))
    together = loss_of(model, batch_of([sample], config), config)
    separate = [
        loss_of(model, batch_of([replace(sample, picks=[pick])], config), config)
        for pick in sample.picks
    ]
    total = sum(output.consistency_loss * output.tokens for output in separate)
    torch.testing.assert_close(together.consistency_loss * together.tokens, total)
    assert len(separate) > 5
    for output in separate:
        torch.testing.assert_close(output.ar_loss, together.ar_loss)


@pytest.mark.parametrize("teacher", ["self", "base"])
def test_losses_of_micro_batches_add_up_to_the_whole_batchs(teacher):
    config = replace(CONFIG, teacher=teacher)
    model = exact_model()
    handle = cllm.patch_training(model, config)
    whole = model(**batch_of(SAMPLES))
    expected = gradients(model, whole.loss)
    totals = float(whole.tokens), float(sum(len(s.example.response) for s in SAMPLES))
    model.zero_grad()
    parts = []
    for sample in SAMPLES:
        part = model(**batch_of([sample]), totals=totals)
        part.loss.backward()
        parts.append(part)
    handle.remove()
    for name in ("loss", "consistency_loss", "ar_loss"):
        total = sum(part[name] for part in parts)
        torch.testing.assert_close(total, whole[name], rtol=1e-12, atol=0)
    assert sum(int(part.tokens) for part in parts) == int(whole.tokens)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


# ---- what never counts: each test drops one mask, and the loss is no longer the defined one ----


def assert_changes_the_loss(model, samples, batch, dropped):
    expected = defined_loss(model, samples, CONFIG).detach()
    torch.testing.assert_close(loss_of(model, batch).loss, expected, rtol=1e-11, atol=0)
    assert not torch.isclose(loss_of(model, dropped).loss, expected, rtol=1e-5, atol=0)


def test_prompt_tokens_are_no_labels():
    samples = [every_state(random_example(1))]
    batch, prompt = batch_of(samples), len(samples[0].example.prompt)
    more = torch.arange(prompt - 1)[None]
    dropped = dict(
        batch,
        clean_index=torch.cat([batch["clean_index"], more], dim=1),
        clean_labels=torch.cat([batch["clean_labels"], batch["input_ids"][:, 1:prompt]], dim=1),
    )
    assert_changes_the_loss(exact_model(), samples, batch, dropped)


@pytest.mark.parametrize(
    "drop",
    [
        lambda batch: {"row_weights": torch.ones_like(batch["row_weights"])},
        lambda batch: {"clean_labels": batch["clean_labels"].clamp(min=0)},
        lambda batch: {"sample_ids": batch["sample_ids"].clamp(min=0)},
    ],
    ids=["rows", "labels", "attention"],
)
def test_padding_counts_nowhere(drop):
    samples = [every_state(random_example(1)), first_states(random_example(2, response=6))]
    batch = batch_of(samples)
    assert (batch["row_weights"] == 0).any() and (batch["sample_ids"] < 0).any()
    assert_changes_the_loss(exact_model(), samples, batch, batch | drop(batch))


def test_tokens_behind_the_end_of_text_count_nowhere():
    end = 2
    example = random_example(7)
    text = [*example.response[:6], end, *example.response[7:]]
    blocks = [
        BlockStates([*block.states[:-1], text[start : start + 4]])
        for start, block in zip(range(0, 13, 4), example.blocks, strict=True)
    ]
    example = replace(example, response=text, blocks=blocks)
    config = replace(CONFIG, states=3)
    kept = SampledDataset([example], config, end_tokens=[end])[0]
    dropped = SampledDataset([example], config)[0]
    assert kept.example.response == text[:7] and len(kept.example.blocks) == 2
    assert kept.picks and max(entry for entry, _ in dropped.picks) > 1
    assert_changes_the_loss(exact_model(), [kept], batch_of([kept]), batch_of([dropped]))


def test_rows_before_the_first_wrong_token_do_not_count(monkeypatch):
    samples = [SampledExample(random_example(1), [(0, 1), (1, 2), (2, 1)])]
    batch = batch_of(samples)
    monkeypatch.setattr(packed_sample, "first_difference", lambda left, right: 0)
    untrimmed = batch_of(samples)
    assert untrimmed["row_weights"].sum() > batch["row_weights"].sum()
    assert_changes_the_loss(exact_model(), samples, batch, untrimmed)


# ---- other teachers ----


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("consistency", ["global", "local"])
def test_teacher_base_is_the_model_before_training(family, consistency):
    config = replace(CONFIG, teacher="base", consistency=consistency)
    model, base = exact_model(family), exact_model(family)
    handle = cllm.patch_training(model, config)
    moved(model)
    batch = batch_of(SAMPLES, config, samples_per_row=2)
    output = model(**batch)
    found = gradients(model, output.loss)
    names = set(model.state_dict())
    handle.remove()
    assert names == set(base.state_dict())
    expected = defined_loss(model, SAMPLES, config, base)
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=0)
    assert not torch.isclose(expected, defined_loss(model, SAMPLES, config), rtol=1e-4)
    for name, gradient in gradients(model, expected).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_teacher_ema_is_the_average_of_the_weights():
    config = replace(CONFIG, teacher="ema", ema_decay=0.75)
    model, average = exact_model(), exact_model()
    handle = cllm.patch_training(model, config)
    for seed in (1, 2):
        moved(model, seed)
        handle.update_teacher()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(0.75).add_(parameter, alpha=0.25)
    output = model(**batch_of(SAMPLES))
    handle.remove()
    expected = defined_loss(model, SAMPLES, config, average)
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=0)


def test_the_ema_of_16_bit_weights_does_not_stand_still():
    model = tiny_copy(torch.bfloat16)
    handle = cllm.patch_training(model, replace(CONFIG, teacher="ema", ema_decay=0.999))
    with torch.no_grad():
        start = model.lm_head.weight.float()
        model.lm_head.weight.add_(0.5)
        moved_by = model.lm_head.weight.float() - start
    for _ in range(2000):
        handle.update_teacher()
    mean = handle.teacher().model.lm_head.weight.float() - start
    torch.testing.assert_close(mean, moved_by * (1 - 0.999**2000), rtol=0.05, atol=0.02)


def test_an_ema_is_taken_up_from_its_state():
    config = replace(CONFIG, teacher="ema", ema_decay=0.9)
    model, other = exact_model(), exact_model()
    handle, resumed = cllm.patch_training(model, config), cllm.patch_training(other, config)
    moved(model)
    handle.update_teacher()
    other.load_state_dict(model.state_dict())
    resumed.load_teacher_state_dict(handle.teacher_state_dict())
    batch = batch_of(SAMPLES)
    assert torch.equal(model(**batch).loss, other(**batch).loss)
    with pytest.raises(ValueError, match="belongs to another model"):
        resumed.load_teacher_state_dict(exact_model("gpt2").state_dict())


def moved(model, seed=0):
    """Change every weight a little, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.05)


def tiny_copy(dtype):
    return copy.deepcopy(tiny_model("llama", dtype))
