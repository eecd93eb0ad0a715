"""Statistics of collected trajectories are those of decoding, and add up."""

from __future__ import annotations

import json

import pytest

import cllm
from cllm.training.collect.block_parallel import collect_states
from cllm.training.collect.statistics import (
    CollectionStatistics,
    confirmed,
    fast_forwarded,
    stationary,
)
from cllm.training.examples import BlockStates, TrainingExample

from ...decoding.tiny_models import PAD, prompts, tiny_model


def test_by_hand():
    block = BlockStates([[9, 9, 3, 9], [1, 9, 3, 4], [1, 2, 8, 4], [1, 2, 3, 9], [1, 2, 3, 4]])
    # pass by pass: right up to 0, 1, 2 and 3; the pass over [1, 2, 3, 9] confirms the last token
    assert block.first_divergence == [0, 1, 2, 3, 4]
    assert confirmed(block) == [1, 1, 1, 1] and fast_forwarded(block) == [0, 0, 0, 0]
    # the first pass drafts 3 (lost again) and 4 (lost again) behind a wrong token
    assert stationary(block) == [0, 0, 0, 0]
    block = BlockStates([[9, 9, 9, 9], [1, 9, 3, 4], [1, 2, 3, 4]])
    # the second pass is over [1, 9, 3, 4], the third over the fixed point: nothing is known before
    assert block.iterations == 3 and confirmed(block) == [1, 1, 2]
    assert fast_forwarded(block) == [0, 0, 1]
    assert stationary(block) == [2, 0, 0]
    assert confirmed(BlockStates([[5, 6]])) == [2]
    assert stationary(BlockStates([[5, 6]])) == [0]


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen2"])
def test_as_decoding_counts_them(family):
    model, n = tiny_model(family), 7
    output = cllm.generate(
        model, **prompts([11, 4, 8]), max_new_tokens=28, eos_token_id=None, mode="block",
        block_size=n, seed=2, record_trajectories=True, return_dict_in_generate=True,
    )  # fmt: skip
    found = collect_states(
        model,
        [trajectory.prompt for trajectory in output.trajectories],
        [trajectory.tokens for trajectory in output.trajectories],
        block_size=n,
        seed=2,
        pad_token_id=PAD,
    )
    for entry, trajectory in zip(found, output.trajectories, strict=True):
        blocks = entry.example.blocks
        assert [n for block in blocks for n in fast_forwarded(block)] == trajectory.fast_forwarded
        assert [n for block in blocks for n in stationary(block)] == trajectory.stationary
    total = CollectionStatistics.of(entry.example for entry in found)
    assert total.iterations == sum(len(item.iterations) for item in output.trajectories)
    assert total.tokens_per_forward == pytest.approx(output.tokens_per_forward)
    assert total.stationary == sum(sum(item.stationary) for item in output.trajectories)
    assert total.fast_forwarded == total.block_tokens - total.iterations


def example(states, prompt=(1, 2), block_index=(1,)):
    return TrainingExample("q", list(prompt), [3, 4, 5], 2, [BlockStates(states)], [*block_index])


def test_sums_and_averages():
    one, other = example([[8], [5]]), example([[9], [5]], prompt=(1,))
    total = CollectionStatistics.of([one, other])
    assert total == CollectionStatistics.of([one]) + CollectionStatistics.of([other])
    assert total == CollectionStatistics.merged(
        [CollectionStatistics(), *(CollectionStatistics.of([each]) for each in (one, other))]
    )
    assert (total.responses, total.prompt_tokens, total.response_tokens) == (2, 3, 6)
    assert (total.blocks, total.block_tokens, total.states, total.state_tokens) == (2, 2, 4, 4)
    assert total.iterations_per_block == 1 and total.tokens_per_forward == 1
    record = json.loads(json.dumps(total.to_json()))
    assert record["states_per_block"] == 2
    assert CollectionStatistics.from_json(record) == total
    assert ("tokens in all states (N)", "4") in total.rows()
    assert CollectionStatistics().tokens_per_forward == 0
