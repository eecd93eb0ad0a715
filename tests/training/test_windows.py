"""Windows of sliding decoding: as long as decoding's, made of states that were there together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import ConsistencyConfig
from cllm.training.examples import BlockStates, TrainingExample
from cllm.training.packed_sample import pack_sample
from cllm.training.packing import ConsistencyCollator
from cllm.training.sampling import SampledDataset, SampledExample, usable_windows
from tests.training.definition import random_example

CONFIG = ConsistencyConfig(sampling="sliding", gated=True)


def sampled(example, states=2, seed=0):
    return SampledDataset([example], replace(CONFIG, states=states), seed)[0]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 999),
    prompt=st.integers(1, 5),
    response=st.integers(1, 30),
    block_size=st.integers(1, 8),
)
def test_windows_are_as_long_as_decodings(seed, prompt, response, block_size):
    example = random_example(seed, prompt, response, block_size)
    sample = sampled(example, seed=seed)
    packed = pack_sample(sample, gated=True)
    text = example.prompt + example.response
    for first, tokens in packed.segments:
        # the last right token, then wrong guesses as far as the window or the text goes
        assert tokens[0] == text[first] and tokens[1] != text[first + 1]
        assert len(tokens) == min(block_size, len(text) - 1 - first)
    # every guess is counted, and taught by the clean row of its place
    assert len(packed.rows) == sum(len(tokens) - 1 for _, tokens in packed.segments)
    assert all(teacher == (0, place) for (_, place), teacher, _ in packed.rows)
    assert all(place < len(packed.clean) for (_, place), _, _ in packed.rows)
    for entry, state in sample.picks:
        assert state in usable_windows(example, entry)
        tail = sample.tails[entry, state]
        assert (tail is None) == (entry == len(example.blocks) - 1)
        assert tail is None or 0 <= tail <= state


def test_a_small_window_written_out():
    right = [21, 22, 23, 24, 25, 26, 27, 28]
    blocks = [
        BlockStates([[21, 9, 8, 7], [21, 22, 23, 6], right[:4]]),
        BlockStates([[1, 2, 3, 4], [25, 2, 3, 4], right[4:]]),
    ]
    example = TrainingExample("a", [11], right, 4, blocks, [0, 1])
    sample = SampledExample(example, [(0, 0), (0, 1), (1, 1)], {(0, 0): 0, (0, 1): 0, (1, 1): None})
    packed = pack_sample(sample, gated=True)
    assert packed.segments == [
        (1, [21, 9, 8, 7]),  # a window of n tokens, its last one no more left out
        (3, [23, 6, 1, 2]),  # goes on in the next block
        (5, [25, 2, 3]),  # the text ends
    ]
    assert [student[1] for student, _, _ in packed.rows] == [2, 3, 4, 4, 5, 6, 6, 7]
    # without the gate, without the right token in front
    assert [tokens for _, tokens in pack_sample(sample).segments] == [[9, 8, 7], [6, 1, 2], [2, 3]]


def test_blocks_that_were_left_out_end_the_window():
    example = random_example(1, response=12, block_size=4)
    gap = replace(example, blocks=[example.blocks[0], example.blocks[2]], block_index=[0, 2])
    sample = sampled(gap, states=9)
    assert {tail for (entry, _), tail in sample.tails.items() if entry == 0} == {None}
    assert pack_sample(sample, gated=True).segments


def test_windows_depend_on_seed_and_epoch_alone():
    dataset = SampledDataset([random_example(1, response=40)], replace(CONFIG, states=2), seed=4)
    assert dataset.drawn(0, 1) == dataset.drawn(0, 1)
    assert len({tuple(dataset.drawn(0, epoch).tails.items()) for epoch in range(5)}) > 1


def test_bad_input():
    with pytest.raises(ValueError, match="sampling='sliding' needs consistency='global'"):
        ConsistencyConfig(sampling="sliding", consistency="local")
    example = random_example(1, response=8, block_size=4)
    for tails in ({(0, 0): 99}, {(1, 0): 0}):
        sample = SampledExample(example, [next(iter(tails))], tails)
        with pytest.raises(ValueError, match="cannot go on with state"):
            ConsistencyCollator(CONFIG)([sample])
