"""Windows that an adapter in training visits: they walk along a known text as decoding does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm
from cllm import ConsistencyConfig
from cllm.training.arguments import ConsistencyTrainingArguments
from cllm.training.checkpoints import CheckpointError
from cllm.training.examples import TrainingExample
from cllm.training.packed_sample import pack_sample
from cllm.training.packing import ConsistencyCollator
from cllm.training.sampling import SampledDataset, SampledExample
from cllm.training.visited import VisitedWindows, Window
from tests.decoding.tiny_models import fresh_model
from tests.training.definition import divergence, logits_of, random_example
from tests.training.exact import FAMILIES, exact_model
from tests.training.gated_definition import adapted, gated_logits

from .runs import (
    EVAL_PROMPTS,
    assert_same_parameters,
    losses,
    parameters,
    whole_and_interrupted,
)

CONFIG = ConsistencyConfig(gated=True, sampling="visited", states=3, window_size=5)
RUN = {
    "gated": True,
    "lora_r": 4,
    "learning_rate": 5e-3,
    "sampling": "visited",
    "window_size": 6,
    "states": 4,
    "stop_on_quality": False,
}


def examples_of(prompt: list[int], response: list[int]) -> TrainingExample:
    return TrainingExample("a", prompt, response, 4, [], [])


# ---- one window ----


def test_a_small_window_written_out():
    text = [11, 12, 21, 22, 23, 24]
    assert Window(1, [21, 22, 9, 24]).inputs(text) == [12, 21, 22, 9]  # 24 is nobody's input
    assert Window(1, [21, 22, 9, 24]).kept(text) == 3
    assert Window(1, [21, 22, 9, 24]).rows(text) == range(3, 4)
    assert Window(1, [7, 22, 23]).rows(text) == range(1, 4)
    assert Window(1, [21, 22, 23]).rows(text) == range(4, 4)  # every guess was right
    assert Window(3, [23, 24, 5, 5]).inputs(text) == [22, 23]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 999),
    prompt=st.integers(1, 5),
    response=st.integers(1, 12),
    windows=st.integers(1, 5),
    sizes=st.lists(st.integers(2, 7), min_size=1, max_size=3),
)
def test_fresh_windows_lie_in_the_response(seed, prompt, response, windows, sizes):
    example = random_example(seed, prompt, response)
    text = example.prompt + example.response
    store = VisitedWindows(1, windows, sizes if len(sizes) > 1 else sizes[0], seed)
    drawn = store.draw(example, 0, 0)
    assert len(drawn) == (windows if response > 1 else 0)
    for number, window in enumerate(drawn):
        assert prompt - 1 <= window.start < len(text) - 2
        assert len(window.guesses) == sizes[number % len(sizes)] - 1
        assert {*window.guesses} <= {*text}
    assert drawn == store.draw(example, 0, 0)  # drawing moves nothing
    starts = [window.start for window in drawn]
    assert starts == sorted(starts)  # spread over the response


def test_windows_advance_by_what_is_committed():
    example = examples_of([1, 2], [21, 22, 23, 24, 25, 26, 27])
    store = VisitedWindows(1, 1, 4)
    store._starts[0, 0], store._guesses[0, 0] = 1, torch.tensor([21, 9, 8])
    store.advance(example, 0, 0, [23, 24])  # of the rows behind 9 and 8
    (window,) = store.draw(example, 0, 0)
    assert window.start == 3 and window.guesses[:2] == [23, 24]
    assert window.guesses[2] in example.prompt  # nobody has guessed it yet
    assert store.tokens_per_forward() == 2.0 and store.tokens_per_forward() is None
    # all right: nothing is predicted, and the window is past them in one step
    store._guesses[0, 0] = torch.tensor([23, 24, 25])
    store.advance(example, 0, 0, [])
    (fresh,) = store.draw(example, 0, 0)  # one token short of the end: it starts anew
    assert int(store._starts[0, 0]) == 7 and fresh == store.draw(example, 0, 0)[0]
    assert {store.draw(example, epoch, 0)[0].start for epoch in range(50)} == set(range(1, 7))


def text_of(example):
    return example.prompt + example.response


def test_windows_of_several_sizes_keep_them():
    example = examples_of([1, 2], list(range(20, 40)))
    store = VisitedWindows(1, 5, [3, 6])
    for epoch in range(4):
        drawn = store.draw(example, epoch, 0)
        assert [len(window.guesses) for window in drawn] == [2, 5, 2, 5, 2]
        rows = sum(len(window.rows(text_of(example))) for window in drawn)
        store.advance(example, epoch, 0, list(range(50, 50 + rows)))
    assert store.state()["guesses"].shape == (1, 5, 5)


def test_predictions_that_belong_to_no_row():
    store = VisitedWindows(1, 1, 4)
    example = examples_of([1, 2], [3, 4, 5, 6, 7])
    rows = sum(len(window.rows(text_of(example))) for window in store.draw(example, 0, 0))
    for count, what in ((rows + 1, "more"), (rows - 1, "fewer")):
        with pytest.raises(ValueError, match=f"{what} predictions than rows"):
            store.advance(example, 0, 0, [1] * count)
    assert bool((store.state()["starts"] == -1).all())  # nothing has moved


# ---- the walk ----


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_window_walks_as_decoding_does(family):
    """Every window of a decoding run, one training step further, is the run's next window."""
    # not so large that decoding clamps the keys of its guess rows
    wrapped = adapted(fresh_model(family), family, scale=0.05)
    prompt, size = [3, 4, 5, 9, 8, 4], 6
    run = cllm.generate(
        wrapped,
        torch.tensor([prompt]),
        max_new_tokens=40,
        do_sample=False,
        adapter=wrapped,
        config=cllm.JacobiConfig(block_size=size, record_trajectories=True, lookup=0),
        return_dict_in_generate=True,
    ).trajectories[0]
    example = examples_of(prompt, run.tokens)
    config = replace(CONFIG, states=1, window_size=size)
    cllm.patch_training(wrapped, config)
    data = SampledDataset([example], config)
    moved = 0
    for now, following in zip(run.iterations, run.iterations[1:], strict=False):
        start = len(prompt) + now.position - 1
        if start + now.exact >= len(prompt) + len(run.tokens) - size:
            break  # what lies behind the text is cut off in training
        data.windows._starts[0, 0] = start
        data.windows._guesses[0, 0] = torch.tensor(now.window[1:])
        batch = ConsistencyCollator(config)([data[0]])
        with torch.no_grad():
            output = wrapped(**batch)
        data.advance(batch["row_numbers"], output.guesses)
        (window,) = data.windows.draw(example, 0, 0)
        assert window.start == len(prompt) + following.position - 1
        known = size - now.exact  # the others are filled in
        assert window.guesses[:known] == following.window[1 : 1 + known]
        moved += 1
    assert moved > 10


# ---- the loss ----


def defined_loss(wrapped, samples, config):
    """Windows fed one by one against a cache of the base model: (loss, rows)."""
    total, weight, rows = torch.zeros((), dtype=wrapped.dtype), 0.0, 0
    for sample in samples:
        text = text_of(sample.example)
        with torch.no_grad(), wrapped.disable_adapter():
            taught = logits_of(wrapped, text)
        for window in sample.windows:
            logits = gated_logits(wrapped, text[: window.start], window.inputs(text))
            counted = list(window.rows(text))
            places = [window.start + row for row in counted]
            weights = config.row_decay ** torch.arange(len(counted), dtype=wrapped.dtype)
            if counted:
                total = (
                    total + (divergence(logits[counted], taught[places], config) * weights).sum()
                )
            weight, rows = weight + float(weights.sum()), rows + len(counted)
    return total / weight, rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("two_parts", [True, False])
def test_loss_and_gradients_are_the_definitions(family, two_parts, exact_softmax):
    config = replace(CONFIG, row_decay=0.5)
    data = SampledDataset([random_example(1, 3, 11), random_example(2, 1, 6)], config, seed=2)
    samples = [data[0], data[1]]
    wrapped = adapted(exact_model(family), family)
    expected, rows = defined_loss(wrapped, samples, config)
    expected.backward()
    gradients = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad(set_to_none=True)
    handle = cllm.patch_training(wrapped, config)
    assert handle._gate.two_parts
    handle._gate.two_parts = two_parts
    collator = ConsistencyCollator(config, samples_per_row=2, column_multiple=8, row_multiple=4)
    output = wrapped(**collator(samples))
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-12)
    assert int(output.tokens) == rows > 10
    output.loss.backward()
    for name, gradient in gradients.items():
        found = wrapped.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_rows_are_numbered_for_the_windows_they_move():
    data = SampledDataset([random_example(seed, 3, 5 + 3 * seed) for seed in range(4)], CONFIG)
    collator = ConsistencyCollator(CONFIG, samples_per_row=2)
    batch = collator([data[index] for index in range(4)])
    numbers = batch["row_numbers"]
    assert torch.equal(numbers >= 0, batch["row_weights"] > 0)
    for index in range(4):
        text = text_of(data[index].example)
        rows = sum(len(window.rows(text)) for window in data[index].windows)
        assert int((numbers == index).sum()) == rows
    before = [data[index].windows for index in range(4)]
    data.advance(numbers, torch.full_like(numbers, 7))
    for index in range(4):
        text = text_of(data[index].example)
        for old, new in zip(before[index], data[index].windows, strict=True):
            start = old.start + old.kept(text)
            if start < len(text) - 2:
                rows = len(old.rows(text))
                assert new.start == start and new.guesses[:rows] == [7] * rows


def test_a_response_without_a_guess_has_no_windows():
    packed = pack_sample(SampledDataset([random_example(1, 3, 1)], CONFIG)[0], gated=True)
    assert packed.segments == [] and packed.rows == []
    assert isinstance(SampledDataset([random_example(1, 3, 9)], CONFIG)[0], SampledExample)


# ---- the trainer ----


def test_training_makes_the_guesses_right(make_trainer):
    trainer = make_trainer(
        prompts=EVAL_PROMPTS,
        **{**RUN, "max_steps": 40, "per_device_train_batch_size": 8, "eval_max_new_tokens": 48},
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    speeds = [entry["visited_tokens_per_forward"] for entry in logs]
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    assert len(speeds) == 40 and min(speeds) >= 1
    found = [e for e in trainer.state.log_history if "eval_tokens" in e][-1]
    assert found["eval_exact_match"] == 1.0
    assert found["eval_tokens_per_forward"] > 1.1 * found["eval_base_tokens_per_forward"]


def test_an_interrupted_run_goes_on_as_if_uninterrupted(make_trainer, tmp_path):
    settings = {
        **RUN,
        "max_steps": 9,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole, second = whole_and_interrupted(make_trainer, tmp_path, 5, settings)
    assert losses(second) == losses(whole) and len(losses(whole)) == 9
    assert_same_parameters(parameters(whole), parameters(second), 0)
    for name, value in whole.examples.windows.state().items():
        assert torch.equal(value, second.examples.windows.state()[name])

    for changes, message in (
        ({"states": 5}, "the checkpoint's windows are not those of this data"),
        ({"window_size": 7}, "guesses is"),
    ):
        more = {**settings, **changes, "max_steps": 10, "output_dir": str(tmp_path / "parts")}
        other = make_trainer(**more)
        with pytest.raises(ValueError, match=message):
            other.train(resume_from_checkpoint=True)
    sliding = {**settings, "sampling": "sliding", "window_size": None}
    other = make_trainer(**{**sliding, "output_dir": str(tmp_path / "sliding")})
    other.train()
    with pytest.raises(CheckpointError, match=r"windows\.pt: it was trained with another sampling"):
        make_trainer(**settings).train(
            resume_from_checkpoint=str(tmp_path / "sliding" / "checkpoint-8")
        )


def test_responses_without_trajectories_are_enough(make_trainer):
    responses = [examples_of([1, 2, 3], list(range(5 + row, 20 + row))) for row in range(4)]
    trainer = make_trainer(dataset=responses, **{**RUN, "max_steps": 2})
    trainer.train()
    assert trainer.meter.total.nominal > 0
    sliding = {**RUN, "sampling": "sliding", "window_size": None, "states": 1}
    with pytest.raises(ValueError, match="responses without trajectories"):
        make_trainer(dataset=responses, **sliding)


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "visited"}, "follows an adapter's guesses; it needs gated=True"),
        ({"gated": True, "window_size": 8}, "window_size is of sampling='visited'"),
        ({"gated": True, "row_decay": 0.5}, "row_decay is of sampling='visited'"),
        ({"gated": True, "sampling": "visited", "window_size": 1}, "window_size must be an int"),
        (
            {"gated": True, "sampling": "visited", "window_size": []},
            r"list of such integers, not \[",
        ),
        ({"gated": True, "sampling": "visited", "window_size": [4, 1]}, "list of such integers"),
        ({"gated": True, "sampling": "visited", "row_decay": 0.0}, r"row_decay must lie in \(0, 1"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataloader_num_workers": 2}, "keeps its windows in this process"),
        ({"augment": 0.5}, "augment adds states, which sampling='visited' does not use"),
    ],
)
def test_arguments_that_do_not_fit(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ConsistencyTrainingArguments(str(tmp_path), use_cpu=True, **{**RUN, **settings})
