"""Which states are drawn: as configured, never a useless one, the same wherever it is drawn."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import ConsistencyConfig
from cllm.training.examples import BlockStates, TrainingExample
from cllm.training.sampling import (
    SampledDataset,
    StateSampler,
    ended,
    usable_states,
    wrong_share,
)
from tests.training.definition import random_example


def graded_example(blocks: int = 8, size: int = 9) -> TrainingExample:
    """Blocks whose state number t has its first t tokens right, so shares go from 1 to 1/size."""
    right = list(range(10, 10 + size))
    trajectory = [right[:t] + [1] * (size - t) for t in range(size)] + [right]
    return TrainingExample(
        "graded", [5], right * blocks, size, [BlockStates(trajectory)] * blocks, list(range(blocks))
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    response=st.integers(1, 40),
    block_size=st.integers(1, 9),
    sampling=st.sampled_from(["uniform", "per_block", "schedule"]),
    states=st.integers(1, 4),
)
def test_draws_what_the_settings_ask_for(seed, response, block_size, sampling, states):
    example = random_example(seed, response=response, block_size=block_size)
    config = ConsistencyConfig(sampling=sampling, states=states)
    picks = StateSampler(config, seed)(example, epoch=3, index=7)
    assert len(set(picks)) == len(picks)
    assert picks == sorted(picks)
    usable = [usable_states(block) for block in example.blocks]
    assert all(state in usable[entry] for entry, state in picks)
    if sampling == "uniform":
        assert len(picks) == min(states, sum(map(len, usable)))
    else:
        counts = Counter(entry for entry, _ in picks)
        assert [counts[entry] for entry in range(len(usable))] == [
            min(states, len(block)) for block in usable
        ]


def test_fixed_points_and_states_without_a_row_are_never_drawn():
    right = [7, 8, 9]
    block = BlockStates([[1, 1, 1], [7, 8, 1], right])  # state 1 is wrong where it is no input
    assert usable_states(block) == [0]
    example = TrainingExample("a", [3], right, 3, [block], [0])
    sampler = StateSampler(ConsistencyConfig(states=5))
    assert sampler(example, 0, 0) == [(0, 0)]
    known = TrainingExample("b", [3], right, 3, [BlockStates([right])], [0])
    assert sampler(known, 0, 0) == []


def test_draws_depend_on_seed_epoch_and_index_alone():
    example, config = graded_example(), ConsistencyConfig()
    picks = StateSampler(config, 1)(example, 2, 3)
    assert picks == StateSampler(config, 1)(example, 2, 3)
    others = [
        StateSampler(config, s)(example, e, i) for s, e, i in ((0, 2, 3), (1, 0, 3), (1, 2, 0))
    ]
    assert picks not in others
    # pinned: another process, another day, another machine
    assert StateSampler(config, 0)(graded_example(3), 0, 0) == [(0, 2), (1, 4), (2, 2)]


def test_uniform_draws_every_state_alike():
    right = [7, 8, 9, 10]
    few, many = [[1] * 4], [[t, 1, 1, 1] for t in range(20, 27)]
    example = TrainingExample(
        "a", [3], right * 2, 4, [BlockStates([*few, right]), BlockStates([*many, right])], [0, 1]
    )
    sampler = StateSampler(ConsistencyConfig(sampling="uniform"))
    counts = Counter(sampler(example, epoch, 0)[0] for epoch in range(4000))
    assert len(counts) == 8
    assert all(abs(count - 500) < 110 for count in counts.values())  # five standard deviations


def test_per_block_draws_the_states_of_a_block_alike():
    sampler = StateSampler(ConsistencyConfig())
    example = graded_example(1)
    counts = Counter(sampler(example, epoch, 0)[0] for epoch in range(4000))
    assert len(counts) == 8
    assert all(abs(count - 500) < 110 for count in counts.values())


def test_schedule_raises_the_noise_over_each_window():
    example = graded_example(blocks=8, size=9)
    config = ConsistencyConfig(sampling="schedule", schedule_window=4)
    picks = StateSampler(config)(example, 0, 0)
    shares = [wrong_share(example.blocks[entry], state) for entry, state in picks]
    wanted = [0, 1 / 3, 2 / 3, 1] * 2
    # shares come in ninths, the lowest of a state with a row is 2/9
    assert shares == pytest.approx([2 / 9, 3 / 9, 6 / 9, 1.0] * 2)
    assert all(
        abs(share - want) <= 2 / 9 + 1e-9 for share, want in zip(shares, wanted, strict=True)
    )


def test_schedule_knows_a_block_by_its_place_and_breaks_ties_by_chance():
    example = graded_example(2)
    moved = TrainingExample(
        "m", [5], example.response * 3, 9, example.blocks, [3, 4]
    )  # the others left out
    config = ConsistencyConfig(sampling="schedule", schedule_window=4)
    assert StateSampler(config)(moved, 0, 0) == [(0, 0), (1, 7)]
    right = [7, 8, 9]
    tied = BlockStates([[1, 2, 9], [2, 1, 9], right])
    tie = TrainingExample("t", [5], right, 3, [tied], [0])
    drawn = {StateSampler(config)(tie, epoch, 0)[0] for epoch in range(40)}
    assert drawn == {(0, 0), (0, 1)}


def test_a_response_ends_with_its_end_of_text_token():
    example = random_example(3, response=11, block_size=4)
    end = example.response[5]
    cut = example.response.index(end) + 1
    shorter = ended(example, [end])
    assert shorter.response == example.response[:cut]
    assert [len(block.fixed_point) for block in shorter.blocks] == [4, cut - 4][
        : len(shorter.blocks)
    ]
    text = [token for block in shorter.blocks for token in block.fixed_point]
    assert text == shorter.response
    assert ended(example, []) is example


def _picks_only(samples):
    return [(sample.example.id, sample.picks) for sample in samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_reaches_workers_that_run_already(workers):
    examples = [random_example(seed) for seed in range(4)]
    dataset = SampledDataset(examples, ConsistencyConfig(), seed=5)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=2,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_picks_only,
    )
    drawn = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        drawn.append([pick for batch in loader for pick in batch])
    sampler = StateSampler(ConsistencyConfig(), 5)
    expected = [
        [(example.id, sampler(example, epoch, i)) for i, example in enumerate(examples)]
        for epoch in (0, 1, 0)
    ]
    assert drawn == expected
    assert drawn[0] != drawn[1]
