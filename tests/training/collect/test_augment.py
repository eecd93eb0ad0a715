"""Corrected states: about half of what is wrong is put right, never all of it."""

from __future__ import annotations

import pickle
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.training.collect.augment import AugmentedTrajectories, corrected
from cllm.training.examples import BlockStates, TrainingExample


@given(wrong=st.lists(st.booleans(), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_some_but_not_all_is_put_right(wrong, seed):
    fixed = list(range(len(wrong)))
    state = [-1 if bad else right for bad, right in zip(wrong, fixed, strict=True)]
    result = corrected(state, fixed, random.Random(seed))
    if sum(wrong) < 2:
        assert result is None
        return
    assert 1 <= result.count(-1) < sum(wrong)
    assert all(
        found in (-1, right) if bad else found == right
        for found, right, bad in zip(result, fixed, wrong, strict=True)
    )


def test_about_half():
    generator, fixed, state = random.Random(0), list(range(16)), [-1] * 16
    left = [corrected(state, fixed, generator).count(-1) for _ in range(500)]
    assert 7.7 < sum(left) / 500 < 8.3
    few = [corrected(state, fixed, generator, share=0.1).count(-1) for _ in range(500)]
    assert sum(few) / 500 > 13


def rows():
    blocks = [BlockStates([[7, 7, 7, 7], [1, 7, 7, 7], [1, 2, 3, 7], [1, 2, 3, 4]])]
    blocks.append(BlockStates([[5, 6]]))
    return [TrainingExample(name, [1], [1, 2, 3, 4, 5, 6], 4, blocks, [0, 1]) for name in "ab"]


def test_the_data_set_keeps_jacobis_states_and_adds_to_them():
    own = rows()
    data = AugmentedTrajectories(own, seed=1)
    assert len(data) == 2
    seen = data[0]
    assert (seen.id, seen.prompt, seen.response) == (own[0].id, own[0].prompt, own[0].response)
    first, second = seen.blocks
    assert second == own[0].blocks[1]
    assert first.states[0::2][:2] == own[0].blocks[0].states[:2]
    assert first.states[-2:] == own[0].blocks[0].states[-2:]
    assert len(first.states) == 6
    for before, between in (first.states[0:2], first.states[2:4]):
        right = [a == b for a, b in zip(between, first.fixed_point, strict=True)]
        assert 1 <= right.count(False) < sum(a != b for a, b in zip(before, [1, 2, 3, 4]))  # noqa: B905
    # the stored rows are as they were, and order of access does not matter
    assert own == rows()
    assert [data[1], data[0]] == [AugmentedTrajectories(rows(), seed=1)[i] for i in (1, 0)]
    assert pickle.loads(pickle.dumps(data))[1] == data[1]
    assert any(AugmentedTrajectories(own, seed=seed)[0] != seen for seed in range(5))


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_bad_share(share):
    with pytest.raises(ValueError, match=f"share must lie between 0 and 1, not {share}"):
        AugmentedTrajectories(rows(), share=share)
