"""The benchmark of a training step runs on a tiny model, and compares the same mathematics."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.training import responses, step, written_out
from benchmarks.training.plots import draw
from cllm.training.packed_sample import pack_sample

TINY = ["--tiny", "--lengths", "12,24", "--block-size", "6", "--responses", "2", "--rounds", "3"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Ops of a few microseconds: waking a second thread for each takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def examples():
    model, prompts = responses.model_and_prompts(None, True, "float32", "cpu", 2)
    return responses.collect(model, prompts, 24, 6)


def check(record):
    assert json.loads(json.dumps(record)) is not None
    same = record["comparison"]
    assert same["length"] == 12 and same["packed_loss"] > 0
    assert same["loss_distance"] < 1e-5 and same["gradient_distance"] < 1e-5
    assert [entry["length"] for entry in record["lengths"]] == [12, 24]
    for entry in record["lengths"]:
        for name in step.CONTENDERS:
            time = entry["seconds"][name]
            assert 0 < time["low"] <= time["median"] <= time["high"]
            assert entry["responses_per_second"][name] == 1 / time["median"]
        assert set(entry["gain"]) == {step.OURS, step.LEAN}
        blocks, prompt = entry["length"] // 6, 11
        theirs = sum(3 * (prompt + 6 * (block + 1)) for block in range(blocks))
        tokens = entry["tokens_forwarded"]
        assert tokens[step.THEIRS] == theirs
        clean = prompt + entry["length"] - 1
        assert tokens[step.OURS] == clean + tokens["of_them_noisy"]
        assert 0 < tokens["of_them_noisy"] <= 5 * blocks
    for name in ("date", "device", "torch", "commit"):
        assert record[name]


def test_a_small_run_and_its_picture(tmp_path):
    record = step.run([*TINY, "--no-memory", "--plot", str(tmp_path / "step.png")])
    check(record)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    for entry in record["lengths"]:
        entry["peak_bytes"] = dict.fromkeys(step.CONTENDERS, 2**30)
    draw(record, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > (tmp_path / "step.png").stat().st_size


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_peaks_of_processes_of_their_own():
    record = step.run(TINY)
    check(record)
    for entry in record["lengths"]:
        assert set(entry["peak_bytes"]) == set(step.CONTENDERS)
        assert entry["training_state_bytes"] > 0 and set(entry["peak_share"]) == {
            step.OURS,
            step.LEAN,
        }


def test_a_loss_of_other_mathematics_stops_the_benchmark(monkeypatch):
    def forgetful(model, sample, config):
        return right(model, sample, config) * 1.001

    right = written_out.counted_rows
    monkeypatch.setattr(written_out, "counted_rows", forgetful)
    with pytest.raises(SystemExit, match="the packed loss is not that of three forwards"):
        step.run([*TINY, "--no-memory"])


def test_the_published_algorithm_on_a_single_block(examples):
    """With one block its means are those of the packed loss, so its gradient is too."""
    sample = responses.sampled(responses.cut(examples[0], 6), step.CONFIG)
    assert sample.picks and pack_sample(sample).rows
    gradients = []
    for function in (written_out.published, written_out.counted_rows):
        model = responses.tiny_model()
        function(model, sample, step.CONFIG)
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_last_block_is_the_longest(examples):
    """So that its peak memory is the published algorithm's."""
    sample = responses.sampled(examples[0], step.CONFIG)
    blocks = list(written_out.blocks_of(sample))
    assert list(written_out.blocks_of(written_out.last_block(sample))) == blocks[-1:]
    assert len(blocks[-1].prefix) == max(len(block.prefix) for block in blocks)


def test_cut_responses_have_the_trajectories_of_short_ones(examples):
    model, prompts = responses.model_and_prompts(None, True, "float32", "cpu", 2)
    short = responses.collect(model, prompts, 12, 6)
    assert [responses.cut(example, 12) for example in examples] == short
    for tokens in (0, 13, 30):
        with pytest.raises(ValueError, match=r"tokens must be a multiple of 6 up to 24, not"):
            responses.cut(examples[0], tokens)


def test_examples_survive_the_file(examples, tmp_path):
    responses.save(examples, tmp_path / "examples.json")
    assert responses.read(tmp_path / "examples.json") == examples
