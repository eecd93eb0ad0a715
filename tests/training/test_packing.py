"""What a packed batch holds: every label once, every row beside its teacher, few shapes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import ConsistencyConfig
from cllm.training.examples import BlockStates, TrainingExample
from cllm.training.packed_sample import forwarded_tokens, pack_sample
from cllm.training.packing import (
    CLEAN_FIELDS,
    ROW_FIELDS,
    TOKEN_FIELDS,
    ConsistencyCollator,
    batch_statistics,
)
from cllm.training.sampling import SampledExample, StateSampler
from tests.training.definition import every_state, first_states, random_example


@st.composite
def sampled_examples(draw):
    """Random texts and states that need not get nearer to the text, with random picks."""
    seed = draw(st.integers(0, 10_000))
    example = random_example(
        seed,
        prompt=draw(st.integers(1, 6)),
        response=draw(st.integers(1, 20)),
        block_size=draw(st.integers(1, 7)),
    )
    example = replace(example, id=f"e{seed}")
    states = [
        (entry, number)
        for entry, block in enumerate(example.blocks)
        for number in range(len(block.states) - 1)
    ]
    picks = draw(st.lists(st.sampled_from(states), unique=True)) if states else []
    return SampledExample(example, sorted(picks))


@settings(max_examples=80, deadline=None)
@given(
    samples=st.lists(sampled_examples(), min_size=1, max_size=4),
    consistency=st.sampled_from(["global", "local"]),
    per_row=st.integers(1, 3),
)
def test_what_every_batch_keeps(samples, consistency, per_row):
    config = ConsistencyConfig(consistency=consistency)
    collator = ConsistencyCollator(
        config, samples_per_row=per_row, column_multiple=8, row_multiple=4
    )
    batch = collator(samples)
    rows, columns = batch["input_ids"].shape
    assert columns % 8 == 0 and batch["student_index"].shape[1] % 4 == 0
    found = []
    for row in range(rows):
        field = {name: value[row].tolist() for name, value in batch.items() if value.dim() == 2}
        sample, segment, position, visible = (
            field[name] for name in ("sample_ids", "segment_ids", "position_ids", "visible")
        )
        texts, labels = defaultdict(list), defaultdict(list)
        for column in range(columns):
            if sample[column] == -1:
                assert (segment[column], visible[column]) == (0, 0)
            elif segment[column] == 0:
                assert visible[column] == position[column] + 1
                texts[sample[column]].append(field["input_ids"][column])
        for index, label in (
            *zip(field["teacher_index"], field["teacher_labels"], strict=True),
            *zip(field["clean_index"], field["clean_labels"], strict=True),
        ):
            if label != -100:
                assert segment[index] == 0
                labels[sample[index]].append((position[index], label))
        found += [(text, sorted(labels[number])) for number, text in texts.items()]
        for student, teacher, weight in zip(
            field["student_index"], field["teacher_index"], field["row_weights"], strict=True
        ):
            assert weight in (0, 1)
            if weight == 1:
                assert segment[student] > 0
                assert sample[student] == sample[teacher] >= 0
                assert position[student] == position[teacher]
                assert consistency == "local" or segment[teacher] == 0
    # every token of every response is a label exactly once, and nothing else is
    expected = []
    for example in (sample.example for sample in samples):
        labels = enumerate(example.response, start=len(example.prompt) - 1)
        expected.append(([*example.prompt, *example.response][:-1], list(labels)))
    assert sorted(found) == sorted(expected)
    statistics = batch_statistics(batch)
    assert statistics.labels == sum(len(sample.example.response) for sample in samples)
    assert statistics.rows == sum(
        len(block.fixed_point) - 1 - block.first_divergence[state]
        for sample in samples
        for entry, state in sample.picks
        if (block := sample.example.blocks[entry]).first_divergence[state]
        < len(block.fixed_point) - 1
    )


def test_a_small_row_written_out():
    right = [21, 22, 23, 24]
    block = BlockStates([[21, 9, 8, 7], [21, 22, 6, 5], right])
    example = TrainingExample("a", [11, 12], [*right, 25], 4, [block], [0])
    batch = ConsistencyCollator(ConsistencyConfig(), 99, column_multiple=1, row_multiple=1)(
        [SampledExample(example, [(0, 0), (0, 1)])]
    )
    assert {name: value[0].tolist() for name, value in batch.items()} == {
        "input_ids": [11, 12, 21, 22, 23, 24, 9, 8, 6],
        "position_ids": [0, 1, 2, 3, 4, 5, 3, 4, 4],
        "sample_ids": [0] * 9,
        "segment_ids": [0, 0, 0, 0, 0, 0, 1, 1, 2],
        "visible": [1, 2, 3, 4, 5, 6, 3, 3, 4],
        "student_index": [6, 7, 8],
        "teacher_index": [3, 4, 4],
        "row_weights": [1.0, 1.0, 1.0],
        "row_numbers": [-1, -1, -1],  # of no data set
        "teacher_labels": [23, 24, -100],
        "clean_index": [1, 2, 5],
        "clean_labels": [21, 22, 25],
        "nominal_tokens": 8,
    }
    statistics = batch_statistics(batch)
    assert (statistics.clean, statistics.noisy, statistics.nominal) == (6, 3, 8)
    assert (statistics.samples, statistics.rows, statistics.labels) == (1, 3, 5)


def test_local_consistency_is_taught_by_the_next_state():
    right = [21, 22, 23, 24, 25]
    block = BlockStates([[9, 8, 7, 6, 5], [21, 22, 4, 3, 2], right])
    example = TrainingExample("a", [11], right, 5, [block], [0])
    packed = pack_sample(SampledExample(example, [(0, 0)]), local=True)
    assert packed.segments == [(1, [9, 8, 7, 6]), (3, [4, 3])]
    # positions 1 and 2 see the same before them as the clean text, 3 and 4 see the next state
    assert [(student, teacher) for student, teacher, _ in packed.rows] == [
        ((1, 1), (0, 1)),
        ((1, 2), (0, 2)),
        ((1, 3), (2, 3)),
        ((1, 4), (2, 4)),
    ]
    assert [label for *_, label in packed.rows] == [22, 23, -100, -100]
    both = pack_sample(SampledExample(example, [(0, 0), (0, 1)]), local=True)
    assert len(both.segments) == 2  # the next state is a student too, and packed once


def test_first_fit_longest_first():
    samples = [first_states(random_example(seed, response=10 + seed)) for seed in range(5)]
    lengths = {s.example.id: pack_sample(s).columns for s in samples}
    room = max(lengths.values()) + min(lengths.values())
    collator = ConsistencyCollator(
        ConsistencyConfig(), samples_per_row=None, max_columns=room, column_multiple=1
    )
    rows = collator.assigned(samples)
    placed = [packed.columns for row in rows for packed in row]
    assert sorted(placed) == sorted(lengths.values())
    assert all(sum(packed.columns for packed in row) <= room for row in rows)
    assert [packed.columns for packed in rows[0]] == [max(lengths.values()), min(lengths.values())]
    assert len(collator(samples)["input_ids"]) == len(rows) < len(samples)


def test_shapes_are_few():
    config = ConsistencyConfig()
    shapes = set()
    for seed in range(20):
        example = random_example(seed, response=10 + seed % 8)
        picks = StateSampler(config)(example, 0, seed)
        batch = ConsistencyCollator(config)([SampledExample(example, picks)])
        shapes.add(tuple(value.shape for value in batch.values()))
    assert len(shapes) == 1


def test_dtypes_and_shapes():
    batch = ConsistencyCollator(ConsistencyConfig())([every_state(random_example(0))])
    for names in (TOKEN_FIELDS, ROW_FIELDS, CLEAN_FIELDS):
        assert len({batch[name].shape for name in names}) == 1
    for name, value in batch.items():
        assert value.dtype == (torch.float32 if name == "row_weights" else torch.int64), name


@pytest.mark.parametrize(("length", "gain"), [(128, 5), (256, 10), (512, 19)])
def test_packing_forwards_a_fraction_of_the_tokens(length, gain):
    example = random_example(0, prompt=40, response=length, block_size=16)
    packed, separate = forwarded_tokens(first_states(example))
    assert packed == 40 + length - 1 + 15 * length // 16
    assert separate == sum(3 * (40 + start + 16) for start in range(0, length, 16))
    assert separate > gain * packed


# ---- bad input ----


def collate(*samples, **settings):
    return ConsistencyCollator(ConsistencyConfig(), **settings)(samples)


def test_refuses_a_text_longer_than_the_context():
    sample = every_state(random_example(1, prompt=5, response=13))
    assert collate(sample, context=18)
    with pytest.raises(ValueError, match=r"5 prompt and 13 response tokens, more than .* 17"):
        collate(sample, context=17)


def test_refuses_a_block_longer_than_the_response():
    example = random_example(1, response=4, block_size=4)
    short = replace(example, response=example.response[:3])
    with pytest.raises(ValueError, match=r"states of 4 tokens, but the response of 3 tokens has 3"):
        collate(every_state(short))
    with pytest.raises(ValueError, match=r"states of 4 tokens, but .* has 0 there"):
        collate(every_state(replace(example, block_index=[5])))


def test_refuses_a_fixed_point_that_is_not_the_text():
    example = random_example(1)
    other = [example.response[0] + 1, *example.response[1:]]
    with pytest.raises(ValueError, match="'random 1': the fixed point of block 0 is not"):
        collate(every_state(replace(example, response=other)))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompt": []}, "empty prompt"), ({"response": [], "blocks": []}, "empty response")],
    ids=str,
)
def test_refuses_an_empty_text(change, message):
    example = replace(random_example(1), **change)
    with pytest.raises(ValueError, match=message):
        collate(SampledExample(example, []))


def test_refuses_picks_that_are_not_there():
    example = random_example(1)
    with pytest.raises(ValueError, match="no state 0 of block entry 9"):
        collate(SampledExample(example, [(9, 0)]))
    last = len(example.blocks[0].states) - 1
    with pytest.raises(ValueError, match="is its fixed point"):
        collate(SampledExample(example, [(0, last)]))


def test_refuses_a_sample_that_no_row_holds():
    with pytest.raises(
        ValueError, match=r"columns \(\d+ of them noisy\), more than max_columns=20"
    ):
        collate(every_state(random_example(1)), max_columns=20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_row": 0}, "samples_per_row must be an integer >= 1, not 0"),
        ({"column_multiple": None}, "column_multiple must be an integer >= 1, not None"),
        ({"samples_per_row": None}, "needs max_columns"),
    ],
    ids=str,
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyCollator(ConsistencyConfig(), **settings)


def test_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="at least one sample"):
        ConsistencyCollator(ConsistencyConfig())([])
