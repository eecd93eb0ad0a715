"""What is recorded of a run: the states of the paper's definition, and counts that add up."""

from __future__ import annotations

import pytest
import torch

import cllm
from cllm.trajectory import TrajectoryError, load, save

from .tiny_models import prompts, tiny_model


def record(mode="sliding", lengths=(6, 3), **options):
    model = tiny_model("mistral")
    inputs = prompts(list(lengths))
    output = cllm.generate(
        model,
        **inputs,
        max_new_tokens=32,
        eos_token_id=None,
        mode=mode,
        record_trajectories=True,
        return_dict_in_generate=True,
        **options,
    )
    return model, inputs, output


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("accept", ["all", "one"])
def test_counts_add_up(mode, accept):
    _, inputs, output = record(mode, accept=accept)
    width = inputs["input_ids"].shape[1]
    assert len(output.trajectories) == 2
    for row, trajectory in enumerate(output.trajectories):
        assert trajectory.tokens == output.sequences[row, width:].tolist()
        assert trajectory.prompt == [
            token
            for token, kept in zip(
                inputs["input_ids"][row].tolist(),
                inputs["attention_mask"][row].tolist(),
                strict=True,
            )
            if kept
        ]
        assert sum(entry.accepted for entry in trajectory.iterations) == len(trajectory.tokens)
        assert len(trajectory.iterations) == int(output.iterations[row])
        assert sum(trajectory.fast_forwarded) == len(trajectory.tokens) - len(
            [entry for entry in trajectory.iterations if entry.accepted]
        )
        for entry in trajectory.iterations:
            end = min(entry.position + entry.exact, len(trajectory.tokens))
            assert (
                entry.predictions[: end - entry.position] == trajectory.tokens[entry.position : end]
            )
            if accept == "one":
                assert entry.accepted == 1


def test_block_states_are_jacobi_iterates():
    """y_i(j+1) = argmax p(. | y_<i(j), x), the paper's equation (2), from plain forwards."""
    model, _, output = record("block", lengths=(6,), block_size=8)
    trajectory = output.trajectories[0]
    with torch.no_grad():
        for entry in trajectory.iterations:
            text = trajectory.prompt + trajectory.tokens[: entry.position]
            assert entry.window[0] == text[-1]
            whole = torch.tensor([text + entry.window[1:]])
            expected = model(input_ids=whole).logits[0, len(text) - 1 :].argmax(-1)
            assert entry.predictions == expected.tolist()
    for before, after in zip(trajectory.iterations, trajectory.iterations[1:], strict=False):
        if before.position == after.position:
            assert after.window[1:] == before.predictions[:-1]
        else:
            assert after.position == before.position + 8
            assert before.exact == 8


def test_stationary_tokens_by_hand():
    iterations = [
        cllm.Iteration(0, [9, 0, 0, 0], [1, 7, 3, 4], 1, 1),
        cllm.Iteration(1, [1, 7, 3, 4], [2, 3, 4, 5], 1, 1),
        cllm.Iteration(2, [2, 3, 4, 5], [3, 4, 5, 6], 4, 3),
    ]
    trajectory = cllm.Trajectory([9], [1, 2, 3, 4, 5], iterations, 4, "sliding")
    # pass 0 drafts 3 and 4 rightly behind a wrong 7; pass 1 drafts nothing behind a wrong token
    assert trajectory.stationary == [2, 0, 0]
    assert trajectory.fast_forwarded == [0, 0, 2]
    assert trajectory.tokens_per_forward == pytest.approx(5 / 3)


def test_round_trip_through_a_file(tmp_path):
    trajectories = record()[2].trajectories
    path = save(tmp_path / "deep" / "trajectories.jsonl", trajectories)
    assert load(path) == trajectories
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_pieces_keep_the_space_that_sentencepiece_drops():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "ly": 2}, unk_token="ly"))
    backend.decoder = decoders.Metaspace()
    trajectory = cllm.Trajectory(
        [0], [1, 2], [cllm.Iteration(0, [0, 1], [1, 2], 2, 2)], 2, "sliding"
    ).with_pieces(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert trajectory.pieces == {0: " one", 1: " two", 2: "ly"}
    assert trajectory.prompt_text == "one"


def test_half_a_surrogate_pair_is_saved(tmp_path):
    trajectory = record()[2].trajectories[0]
    trajectory.prompt_text = "broken \ud83d"
    assert load(save(tmp_path / "t.jsonl", [trajectory]))[0].prompt_text == "broken \ud83d"


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    path = save(tmp_path / "t.jsonl", record()[2].trajectories)
    lines = path.read_text().splitlines()
    for damaged in (
        "{",
        "[1]",
        '{"prompt": []}',
        lines[1].replace('"accepted": 1', '"accepted": 3'),
    ):
        path.write_text(lines[0] + "\n" + damaged + "\n")
        with pytest.raises(TrajectoryError, match=r"t\.jsonl, line 2: "):
            load(path)
