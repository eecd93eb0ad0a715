from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cllm.training.store import load_trajectories

from .harness import PROMPTS, environment, write_prompts

pytest.importorskip("pyarrow")

# the tiny model repeats itself as it likes
NO_FILTERS = ("--max-cycle", 1, "--max-repeated-ngrams", 1, "--max-repeated-sentences", 1)
SMALL = ("--max-new-tokens", 24, "--block-size", 8, "--shard-size", 3, *NO_FILTERS)


@pytest.fixture
def collect(run, model_folder, prompts_file):
    """Run ``cllm collect`` on the 24 prompts."""

    def call(output: Path, *arguments: object, small=SMALL):
        options = ("--model", model_folder, "--prompts", prompts_file, "--output", output)
        return run("collect", *options, *small, *arguments)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder):
    """An uninterrupted run's folder."""
    from cllm.cli import main

    folder = tmp_path_factory.mktemp("whole")
    prompts = write_prompts(folder / "prompts.jsonl", PROMPTS)
    arguments = ("--model", model_folder, "--prompts", prompts, "--output", folder / "out")
    assert main(["collect", *map(str, (*arguments, *SMALL))]) == 0
    return folder / "out"


def test_a_local_file_takes_the_place_of_a_recipes_data_set(collect, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("collect:\n  prompts: some/hub-name\n  dataset_config: main\n")
    refused = collect(tmp_path / "out", "--config", recipe)
    assert refused.code == 2 and "is a file; it has no configuration 'main'" in refused.err
    taken = collect(tmp_path / "out", "--config", recipe, "--dataset-config", "", "--limit", 2)
    assert taken.code == 0, taken.err
    assert len(rows(tmp_path / "out")) == 2


def rows(folder: Path) -> list:
    return list(load_trajectories(folder))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


def finished(folder: Path) -> int:
    """Shards that are there for good."""
    return len(list((folder / "progress").glob("0*.json")))


def test_rows_are_the_models_greedy_text(whole, model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cllm.responders import make_responder

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = rows(whole)
    assert [example.id for example in data] == [str(number) for number in range(24)]
    responder = make_responder(model, "huggingface")
    for example, text in zip(data, PROMPTS, strict=True):
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert example.prompt == ids
        assert [example.response] == responder([ids], 24)
        assert [token for block in example.blocks for token in block.fixed_point] == (
            example.response
        )
    ended = {example.response[-1] == tokenizer.eos_token_id for example in data}
    assert ended == {True, False}  # both kinds are there


def test_summary_and_manifest(collect, whole, tmp_path):
    result = collect(tmp_path / "out", "--json")
    summary = json.loads(result.out)
    manifest = load_trajectories(whole).manifest
    assert result.code == 0 and "24 of 24 prompts, 8 of 8 shards" in result.err
    assert summary["settings"]["prompts"] == 24 and summary["complete"]
    assert summary["statistics"] == manifest.statistics
    assert summary["settings"]["counts"] == manifest.settings["counts"]
    assert manifest.settings["counts"] == {"checked": 24, "near_ties": 0}
    assert manifest.statistics["response_tokens"] == sum(
        len(example.response) for example in rows(whole)
    )
    again = collect(tmp_path / "out")
    assert again.code == 0 and "continuing: 8 of 8 shards are there" in again.err
    lines = {line.split()[0]: line.split()[1:] for line in again.out.splitlines() if line.strip()}
    assert lines["prompts"] == ["24"] and lines["kept"] == ["24"]


def test_engines_and_batches_give_the_same_files(collect, whole, tmp_path):
    assert collect(tmp_path / "a", "--engine", "huggingface").code == 0
    assert collect(tmp_path / "b", "--batch-size", 2).code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(whole)


# Loads everything once, then starts a run, waits for its first shard and a moment longer, and ends
# it, many times over.
_ENDED_EARLY = """
import glob, os, signal, sys, time
import torch, transformers
import cllm.cli, cllm.responders, cllm.training.collect.runner
torch.set_num_threads(1)  # a fork has no other threads
*options, errors, moments = sys.argv[1:]
finished = lambda: len(glob.glob(options[-1] + "/progress/0*.json"))
moments = [float(moment) for moment in moments.split(",")]
for number, moment in enumerate(moments):
    before = finished()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(cllm.cli.main(options))
    while finished() == before and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(child, signal.SIGINT if number + 1 == len(moments) else signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), finished())
"""


@pytest.mark.slow
def test_ended_at_random_moments_and_continued(
    collect, whole, tmp_path, model_folder, prompts_file
):
    """Killed three times, interrupted once, then left to finish."""
    output, errors = tmp_path / "out", tmp_path / "errors"
    small = (*SMALL, "--shard-size", 1)
    options = ("--model", model_folder, "--prompts", prompts_file, *small, "--output", output)
    generator = random.Random(5)
    moments = [f"{generator.uniform(0, 0.2):.4f}" for _ in range(4)]
    done = subprocess.run(
        [sys.executable, "-c", _ENDED_EARLY, "collect", *map(str, options), errors,
         ",".join(moments)],
        capture_output=True, text=True, env=environment(), timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    counts = [count for _, count in ends]
    # every run went on where the one before had ended, and none came to its end
    assert counts == sorted(set(counts)) and counts[-1] < 24
    assert [code for code, _ in ends] == [-signal.SIGKILL] * 3 + [130]
    assert errors.read_text().splitlines()[-1] == (
        f"cllm: interrupted: {counts[-1]} of 24 shards are in {output}; "
        "run the same command to continue"
    )
    assert not (output / "manifest.json").exists()
    (output / "part-00007.parquetxyz.part").write_bytes(b"half a file")
    result = collect(output, small=small)
    assert result.code == 0
    assert f"continuing: {counts[-1]} of 24 shards are there" in result.err
    assert not list(output.glob("**/*.part"))
    again = tmp_path / "again"
    assert collect(again, small=small).code == 0
    assert files(output) == files(again)
    assert rows(output) == rows(again)
    assert rows(output) == rows(whole)


@pytest.mark.slow
def test_two_processes_give_the_same_files(whole, tmp_path, model_folder, prompts_file):
    output = tmp_path / "out"
    options = ("--model", model_folder, "--prompts", prompts_file, "--output", output, *SMALL)
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = subprocess.run(
        [sys.executable, *map(str, command), "-m", "cllm.cli", "collect", *map(str, options)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2: 12 of 12 prompts, 4 of 4 shards" in done.stderr
    assert done.stdout.count("is ready to train on") >= 1
    assert files(output) == files(whole)
    assert rows(output) == rows(whole)


def test_disk_full_keeps_what_is_whole(collect, whole, tmp_path):
    """A limit on a file's size stands for the disk: the write fails in the middle."""
    output = tmp_path / "out"
    sizes = sorted(path.stat().st_size for path in whole.glob("part-*"))
    limit = (sizes[0] + sizes[-1]) // 2
    assert sizes[0] < limit < sizes[-1]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = collect(output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    kept = finished(output)
    assert result.code == 2
    assert (
        "File too large" in result.error and f"{kept} of 8 shards are in {output}" in result.error
    )
    assert not list(output.glob("*.part")) and len(files(output)) == kept < 8
    assert collect(output).code == 0
    assert files(output) == files(whole)


def test_other_settings_are_refused(collect, whole, tmp_path, run):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    result = collect(output, "--seed", 5, "--max-cycle", 0.5)
    assert result.code == 2
    assert "other settings (cleaning.max_cycle 1.0 -> 0.5, seed 0 -> 5)" in result.error
    assert "--overwrite" in result.error
    assert "rows" in collect(output, "--limit", 5).error
    assert files(output) == files(whole)
    assert collect(output, "--limit", 5, "--overwrite").code == 0
    assert len(rows(output)) == 5


def test_foreign_and_damaged_shards(collect, whole, tmp_path):
    output = tmp_path / "foreign"
    output.mkdir()
    shutil.copy(whole / "part-00000.parquet", output)
    assert "holds part-00000.parquet, but nothing tells of a run" in collect(output).error
    output = tmp_path / "more"
    shutil.copytree(whole, output)
    shutil.copy(whole / "part-00000.parquet", output / "part-00099.parquet")
    assert "part-00099.parquet belongs to no shard of this run" in collect(output).error
    (output / "part-00099.parquet").unlink()
    damaged = output / "part-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    error = collect(output).error
    assert "part-00003.parquet is damaged" in error and "delete it" in error
    damaged.unlink()
    record = output / "progress" / "00005.json"
    content = record.read_bytes()
    record.write_bytes(content[:40])
    error = collect(output).error
    assert "00005.json is damaged" in error and "delete it" in error
    record.write_bytes(content)
    run_file = output / "progress" / "run.json"
    content = run_file.read_bytes()
    run_file.write_bytes(b"{}")
    assert "run.json is damaged; use --overwrite" in collect(output).error
    run_file.write_bytes(content)
    result = collect(output)
    assert result.code == 0 and "continuing: 7 of 8" in result.err
    assert files(output) == files(whole)


def test_two_runs_at_once_are_refused(collect, tmp_path, monkeypatch):
    import fcntl

    output = tmp_path / "out"
    (output / "progress").mkdir(parents=True)
    with open(output / "progress" / "process-0.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "another process (rank 0) is writing" in collect(output).error
    with open(output / "progress" / "process-3.lock", "w+") as stream:
        stream.write("4")
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "another run of 4 process(es) is writing" in collect(output).error
        # a sibling's lock is none of our business
        monkeypatch.setenv("WORLD_SIZE", "4")
        result = collect(output)
        assert result.code == 0 and "the others are still at work (2 of 8 shards)" in result.err
    monkeypatch.setenv("RANK", "4")
    assert "RANK=4 of WORLD_SIZE=4" in collect(output).error
    monkeypatch.setenv("RANK", "one")
    assert "RANK is 'one'" in collect(output).error


def test_recipe_file(collect, whole, tmp_path, run, model_folder):
    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"collect:\n  prompts: {prompts}\n  output: {tmp_path / 'out'}\n  model: {model_folder}\n"
        "  max-new-tokens: 24\n  block_size: 99\n  shard-size: 3\n  max-cycle: 1\n"
        "  max-repeated-ngrams: 1.0\n  max-repeated-sentences: 1\n  drop-cut: false\n"
        "  where: ['prompt!=nothing']\n  limit:\ntrain:\n  lr: 1\n"
    )
    result = run("collect", "--config", recipe, "--block-size", 8)
    assert result.code == 0, result.err
    assert files(tmp_path / "out") == files(whole)
    for text, message in (
        ("blocksize: 8", "unknown setting 'blocksize'; did you mean 'block_size'?"),
        ("- a", "holds no settings"),
        ("a: [", "line 1: not YAML"),
        ("block-size: many", "Invalid value for '--block-size'"),
    ):
        recipe.write_text(text)
        result = run("collect", "--config", recipe, "--prompts", prompts, "--output", tmp_path)
        assert result.code == 2 and message in result.error
    assert "No such file" in run("collect", "--config", tmp_path / "no.yaml").error


def brought(path: Path, data: list, key) -> Path:
    path.write_text(
        "".join(
            json.dumps({"prompt": text, "response": key(example)}) + "\n"
            for text, example in zip(PROMPTS, data, strict=True)
        )
    )
    return path


def test_brought_responses(run, whole, tmp_path, model_folder):
    end = 0
    data = rows(whole)

    def bring(name: str, key, *arguments: object):
        prompts = brought(tmp_path / f"{name}.jsonl", data, key)
        options = ("--model", model_folder, "--prompts", prompts, "--output", tmp_path / name)
        return run("collect", *options, *SMALL, "--response-column", "response", *arguments)

    def wrong(example, count: int):
        """Every so many responses have a token that is not the likeliest."""
        if int(example.id) % (24 // count) == 0:
            return [*example.response[:-2], (example.response[-2] + 1) % 50 + 5]
        return example.response

    assert bring("ids", lambda example: example.response).code == 0
    assert files(tmp_path / "ids") == files(whole)
    # engines leave the end-of-text token out
    ended = lambda e: e.response[:-1] if e.response[-1] == end else e.response  # noqa: E731
    assert bring("ended", ended).code == 0
    assert files(tmp_path / "ended") == files(whole)

    result = bring("one", lambda example: wrong(example, 1))
    assert result.code == 0
    assert "dropped 1 not the model's output" in " ".join(result.out.split())
    assert rows(tmp_path / "one") == data[1:]
    result = bring("four", lambda example: wrong(example, 4))
    assert result.code == 2
    # two are more than 5 % of the 24 prompts: the run ends with the second shard that has one
    assert "2 of 9 responses are not the model's output (22%, at most 5%" in result.error
    assert finished(tmp_path / "four") == 3
    result = bring("four", lambda example: wrong(example, 4), "--max-mismatch", 0.5)
    assert result.code == 0 and len(rows(tmp_path / "four")) == 20
    result = bring("foreign", lambda example: [99999])
    assert result.code == 2 and "the token id 99999, but the model's vocabulary" in result.error


def test_prompts_from_columns_with_few_shot_and_holdout(run, tmp_path, model_folder):
    from transformers import AutoTokenizer

    data = tmp_path / "data.jsonl"
    lines = [
        {"db": f"db{number % 4}", "schema": f"t{number % 4}", "question": text}
        for number, text in enumerate(PROMPTS[:8])
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"schema": "s", "question": "q", "answer": "a"}))
    options = ("--model", model_folder, "--prompts", data, "--prompt-template",
               r"{schema}\nQuestion: {question}", "--few-shot", shots, "--system", "sql",
               "--holdout-by", "db", "--holdout-share", 0.5, *SMALL)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = []
    for take in ("train", "holdout"):
        output = tmp_path / take
        assert run("collect", *options, "--output", output, "--take", take).code == 0
        found += rows(output)
    assert sorted(tokenizer.decode(example.prompt) for example in found) == sorted(
        "<system>sql<end><user>s\nQuestion: q<end><assistant>a<end>"
        f"<user>{line['schema']}\nQuestion: {line['question']}<end><assistant>"
        for line in lines
    )
    groups = [{int(example.id) % 4 for example in rows(tmp_path / t)} for t in ("train", "holdout")]
    assert groups[0] and groups[1] and not groups[0] & groups[1]
    chosen = ("--take", "train", "--skip", 1, "--limit", 1)
    assert run("collect", *options, "--output", tmp_path / "second", *chosen).code == 0
    second = [example.id for example in rows(tmp_path / "second")]
    assert second == [example.id for example in rows(tmp_path / "train")][1:2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(collect, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "not writable" in collect(locked).error


def test_output_that_is_a_file(collect, tmp_path):
    file = tmp_path / "file"
    file.write_text("here first")
    assert "is a file; name a folder" in collect(file).error
    assert file.read_text() == "here first"


def test_dropped_rows_are_counted(run, tmp_path, model_folder):
    prompts = write_prompts(
        tmp_path / "prompts.jsonl", [PROMPTS[0], f" {PROMPTS[0]} ", "eggs and " * 400, *PROMPTS[1:]]
    )
    options = ("--model", model_folder, "--prompts", prompts, "--output", tmp_path / "out")
    result = run("collect", *options, *SMALL, "--drop-cut", "--json")
    dropped = json.loads(result.out)["dropped"]
    assert dropped["prompt seen before"] == 1
    assert dropped["prompt longer than the context"] == 1
    assert dropped["response cut by the limit"] > 0
    assert len(rows(tmp_path / "out")) == 26 - sum(dropped.values())


def test_nothing_is_left(run, tmp_path, model_folder):
    prompts = write_prompts(tmp_path / "long.jsonl", ["eggs and " * 400, "x " * 600])
    options = ("--model", model_folder, "--output", tmp_path / "out")
    result = run("collect", *options, *SMALL, "--prompts", prompts)
    assert result.code == 2
    assert "nothing is left of 2 prompts: 2 prompt longer than the context" in result.error


def test_block_size_larger_than_every_response(collect, whole, tmp_path):
    result = collect(tmp_path / "a", "--block-size", 25)
    assert "block_size=25 is larger than every response: max_new_tokens is 24" in result.error
    shortest = min(rows(whole), key=lambda example: len(example.response))
    assert len(shortest.response) < 24
    result = collect(tmp_path / "b", "--block-size", 24, "--where",
                     f"prompt={PROMPTS[int(shortest.id)]}")  # fmt: skip
    assert result.code == 2
    assert (
        "block_size=24 is larger than every response: the longest has "
        f"{len(shortest.response)} tokens" in result.error
    )


def test_nan_logits(run, tmp_path, model_folder, prompts_file):
    import torch
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    model.save_pretrained(broken)
    for engine in ("jacobi", "huggingface"):
        result = run("collect", "--model", broken, "--prompts", prompts_file, "--output",
                     tmp_path / engine, "--engine", engine, *SMALL)  # fmt: skip
        assert result.code == 2 and "the model gives NaN logits in float32" in result.error
