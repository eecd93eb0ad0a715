from __future__ import annotations

import io
import json
import signal
import time
from pathlib import Path

import pytest

import cllm.trajectory
from cllm.commands import generate

from .harness import PROMPTS, read_rows, start, write_prompts

SMALL = ("--max-new-tokens", 16, "--block-size", 4, "--device", "cpu")


@pytest.fixture
def batch(model_folder, prompts_file):
    """Arguments that decode the prompts file."""
    return ("generate", "--model", model_folder, "--prompts", prompts_file, *SMALL)


@pytest.fixture
def whole(run, batch, tmp_path) -> list[dict]:
    """The rows of a run that was not interrupted."""
    assert run(*batch, "--output", tmp_path / "whole.jsonl").code == 0
    return read_rows(tmp_path / "whole.jsonl")


def test_rows(whole):
    assert [row["index"] for row in whole] == list(range(len(PROMPTS)))
    assert [row["prompt"] for row in whole] == PROMPTS
    for row in whole:
        assert len(row["token_ids"]) == row["tokens"] <= 16
        assert row["tokens_per_forward"] == pytest.approx(row["tokens"] / row["iterations"])
        ended = row["token_ids"][-1] == 0
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert ended or row["tokens"] == 16
    assert {row["finish_reason"] for row in whole} == {"stop", "length"}


def test_batches_give_the_same_rows(run, batch, whole, tmp_path):
    assert run(*batch, "--output", tmp_path / "rows.jsonl", "--batch-size", 5).code == 0
    assert read_rows(tmp_path / "rows.jsonl") == whole


def test_samples_are_those_of_their_seed_in_any_batch(run, batch, whole, tmp_path):
    def rows(name, *options):
        output = tmp_path / name
        result = run(*batch, "--output", output, "--temperature", 1.5, "--top-p", 0.95, *options)
        assert result.code == 0, result.err
        return [row["token_ids"] for row in read_rows(output)]

    alone = rows("alone.jsonl", "--seed", 3)
    assert alone == rows("batch.jsonl", "--seed", 3, "--batch-size", 7, "--block-size", 6)
    assert alone != rows("other.jsonl", "--seed", 4)
    assert alone != [row["token_ids"] for row in whole]
    result = run(*batch, "--output", tmp_path / "alone.jsonl", "--seed", 3)
    assert result.code != 0 and "sampling" in result.err


@pytest.mark.parametrize(
    ("flag", "value"), [("--temperature", 0), ("--temperature", "nan"), ("--top-p", 1.5)]
)
def test_sampling_out_of_range(run, batch, flag, value):
    result = run(*batch, flag, value)
    assert result.code == 2 and f"{flag} {value} must be above 0" in result.err


def test_rows_to_standard_output(run, batch, whole):
    result = run(*batch)
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert rows == [{k: v for k, v in row.items() if k != "settings"} for row in whole]


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_continues_after_a_cut_file(run, batch, whole, tmp_path, cut):
    """Seven rows and `cut` bytes of the eighth are on disk."""
    output = tmp_path / "rows.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:7]) + lines[7][:cut])
    result = run(*batch, "--output", output)
    assert result.code == 0 and "continuing: 7 of 24 rows" in result.err
    assert read_rows(output) == whole
    assert "all 24 rows are in" in run(*batch, "--output", output).err


def test_continues_after_sigkill(run, batch, whole, tmp_path):
    output, records = tmp_path / "rows.jsonl", tmp_path / "records.jsonl"
    arguments = (*batch, "--output", output, "--trajectories", records)
    process = start(*arguments)
    _wait_for_rows(process, output)
    process.kill()
    process.communicate()
    finished = len(output.read_bytes().splitlines())
    assert process.returncode == -signal.SIGKILL and finished >= 2
    assert run(*arguments).code == 0
    assert read_rows(output) == whole
    trajectories = cllm.trajectory.load(records)
    assert [t.tokens for t in trajectories] == [row["token_ids"] for row in whole]


def test_interrupt_keeps_rows_and_says_so(batch, tmp_path, model_folder):
    output = tmp_path / "rows.jsonl"
    many = write_prompts(tmp_path / "many.jsonl", PROMPTS * 40)
    process = start("generate", "--model", model_folder, "--prompts", many, *SMALL,
                    "--output", output)  # fmt: skip
    _wait_for_rows(process, output)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    rows = read_rows(output)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        f"cllm: interrupted: {len(rows)} of 960 rows are in {output}; "
        "run the same command to continue"
    )


def _wait_for_rows(process, output: Path) -> None:
    """Until two rows are there."""
    deadline = time.monotonic() + 100
    while not output.exists() or output.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_other_settings_or_prompts_are_refused(run, batch, whole, tmp_path, model_folder):
    output = tmp_path / "whole.jsonl"
    before = output.read_bytes()
    result = run(*batch, "--output", output, "--seed", 5)
    assert result.code == 2
    assert "line 1: the row was made with other settings (seed 0 -> 5)" in result.error
    assert "--overwrite" in result.error
    other = write_prompts(tmp_path / "other.jsonl", [PROMPTS[0], "another"])
    arguments = ("generate", "--model", model_folder, "--prompts", other, *SMALL)
    result = run(*arguments, "--output", output)
    assert result.code == 2 and "line 2: the row was made for another prompt" in result.error
    assert output.read_bytes() == before
    assert run(*arguments, "--output", output, "--overwrite").code == 0
    assert [row["prompt"] for row in read_rows(output)] == [PROMPTS[0], "another"]


def test_the_prompts_are_not_written_over(run, tmp_path, model_folder):
    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS[:2])
    before = prompts.read_bytes()
    arguments = ("generate", "--model", model_folder, "--prompts", prompts, *SMALL)
    again = tmp_path / "." / "prompts.jsonl"
    for flag in ("--output", "--trajectories"):
        other = () if flag == "--output" else ("--output", tmp_path / "out.jsonl")
        result = run(*arguments, *other, flag, again, "--overwrite")
        assert result.code == 2 and f"--prompts and {flag} name the same file" in result.error
    assert prompts.read_bytes() == before


@pytest.mark.parametrize("content", [b"notes to self", b"notes\n", b'{"index": 3}\n', b"[1]\n"])
def test_foreign_files_are_left_alone(run, batch, tmp_path, content):
    output = tmp_path / "notes.txt"
    output.write_bytes(content)
    result = run(*batch, "--output", output)
    assert result.code == 2 and "cllm generate" in result.error
    assert output.read_bytes() == content


def test_records_out_of_step_are_refused(run, batch, whole, tmp_path):
    result = run(*batch, "--output", tmp_path / "whole.jsonl", "--trajectories", tmp_path / "new")
    assert result.code == 2 and "has 0 records for the 24 rows" in result.error


def test_two_writers_are_refused(run, batch, tmp_path):
    import fcntl

    output = tmp_path / "rows.jsonl"
    with open(output, "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        result = run(*batch, "--output", output)
    assert result.code == 2 and "another process is writing" in result.error


def test_one_prompt_streams_its_text(run, model_folder, whole):
    result = run("generate", "--model", model_folder, "--prompt", PROMPTS[0], *SMALL)
    assert result.code == 0
    assert result.out.rstrip("\n") == whole[0]["text"].rstrip("\n")
    assert f"{whole[0]['tokens']} tokens in {whole[0]['iterations']} forwards" in result.err


def test_standard_input(run, model_folder, whole, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(PROMPTS[1].encode()))
    monkeypatch.setattr("sys.stdin", stream)
    result = run("generate", "--model", model_folder, *SMALL)
    assert result.out.rstrip("\n") == whole[1]["text"].rstrip("\n")


def test_system_and_template_change_the_prompt(run, model_folder, tmp_path):
    texts = set()
    for index, extra in enumerate([(), ("--system", "be brief"), ("--no-chat-template",)]):
        output = tmp_path / f"{index}.jsonl"
        arguments = ("generate", "--model", model_folder, "--prompt", "the cat", *SMALL)
        assert run(*arguments, *extra, "--output", output).code == 0
        texts.add(tuple(read_rows(output)[0]["token_ids"]))
    assert len(texts) == 3
    result = run("generate", "--model", model_folder, "--prompt", "x", "--no-chat-template",
                 "--system", "y", *SMALL)  # fmt: skip
    assert result.code == 2 and "switched off" in result.error


def test_rows_are_synced_before_the_next(run, batch, tmp_path, monkeypatch):
    """When a prompt fails midway, every row before it is on disk."""
    output = tmp_path / "rows.jsonl"
    decode = generate._Run._decode

    def failing(self, members, streamer=None):
        if members == [3]:
            raise MemoryError("no room")
        return decode(self, members, streamer)

    monkeypatch.setattr(generate._Run, "_decode", failing)
    result = run(*batch, "--output", output)
    assert result.code == 1 and "MemoryError: no room" in result.error
    assert len(read_rows(output)) == 3


def test_an_automatic_block_size_gives_the_same_rows(run, batch, whole, tmp_path):
    result = run(*batch, "--block-size", "auto", "--output", tmp_path / "rows.jsonl")
    assert result.code == 0, result.err
    found = [row["token_ids"] for row in read_rows(tmp_path / "rows.jsonl")]
    assert found == [row["token_ids"] for row in whole]
    result = run(*batch, "--block-size", "many")
    assert result.code == 2 and "'many' is neither an integer >= 1 nor auto" in result.err
    result = run(*batch, "--block-size", "auto", "--mode", "block")
    assert result.code == 2 and "--block-size auto needs --mode sliding" in result.err


@pytest.mark.parametrize(
    "options",
    [
        ("--no-pool",),
        ("--pool", "--lookup", 0),
        ("--guesses", "ordered"),
        ("--candidates", 3),
        ("--compile", "off"),
    ],
)
def test_where_guesses_come_from_changes_no_row(run, batch, whole, tmp_path, options):
    result = run(*batch, *options, "--output", tmp_path / "rows.jsonl")
    assert result.code == 0, result.err
    found = [row["token_ids"] for row in read_rows(tmp_path / "rows.jsonl")]
    assert found == [row["token_ids"] for row in whole]


def test_the_options_of_guesses_reach_the_decoder(run, batch, monkeypatch):
    seen = []

    def decode(self, members, streamer=None):
        seen.append(self._config)
        raise MemoryError("seen")

    monkeypatch.setattr(generate._Run, "_decode", decode)
    run(*batch, "--no-pool", "--guesses", "ordered", "--candidates", 3, "--compile", "off")
    run(*batch)
    given = [(config.pool, config.guesses, config.candidates, config.compile) for config in seen]
    assert given == [(False, "ordered", 3, "off"), (None, "adaptive", 1, None)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pool", "--mode", "block"), "--pool needs --mode sliding"),
        (("--candidates", 2, "--mode", "block"), "--candidates 2 needs --mode sliding"),
        (("--guesses", "ordered", "--mode", "block"), "--guesses ordered needs --mode sliding"),
        (("--candidates", 2, "--block-size", "auto"), "leave it or --candidates 2"),
        (
            ("--candidates", 2, "--adapter", "x", "--verify-size", 2),
            "--candidates 2 are all checked whole; leave --verify-size out",
        ),
        (("--compile", "graph"), "compile='graph' needs a CUDA device"),
        (
            ("--compile", "inductor", "--block-size", "auto"),
            "--block-size auto times windows of many sizes; give a number with --compile inductor",
        ),
        (("--compile", "inductor", "--adapter", "x"), "--compile inductor has no adapter rows"),
        (("--compile", "fast"), "inductor"),
    ],
)
def test_options_of_guesses_that_do_not_fit(run, batch, options, message):
    result = run(*batch, *options)
    assert result.code == 2 and message in result.error
