from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.prompts import PromptError, encode
from cllm.training.collect.sources import (
    Columns,
    FewShot,
    Source,
    is_held_out,
    read_few_shot,
    read_source,
)

ROWS = [
    {
        "db": f"db{number % 5}",
        "question": f"q{number}?",
        "schema": f"t{number}",
        "level": number % 3,
    }
    for number in range(20)
]
QUESTION = Columns("question")


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def texts(rows) -> list[str]:
    return [row.prompt.text for row in rows]


def test_jsonl_columns_template_and_ids(jsonl):
    rows = read_source(Source(jsonl), QUESTION)
    assert texts(rows) == [row["question"] for row in ROWS]
    assert [row.prompt.id for row in rows[:3]] == ["0", "1", "2"]
    assert rows[2].prompt.where == "the prompt of line 3"
    template = Columns(template="{schema}\n\nQuestion: {question} {{{level}}}", id="schema")
    rows = read_source(Source(jsonl, limit=2), template)
    assert texts(rows) == ["t0\n\nQuestion: q0? {0}", "t1\n\nQuestion: q1? {1}"]
    assert [row.prompt.id for row in rows] == ["t0", "t1"]


def test_every_kind_of_source_gives_the_same_rows(jsonl, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=data, other=data.select([1])).save_to_disk(tmp_path / "splits")
    data.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    data.to_parquet(tmp_path / "folder" / "train.parquet")
    data.to_csv(tmp_path / "rows.csv")
    wanted = read_source(Source(jsonl), QUESTION)
    for name in ("saved", "splits", "rows.parquet", "folder", "rows.csv"):
        rows = read_source(Source(str(tmp_path / name)), QUESTION)
        assert [(row.prompt.id, row.prompt.text) for row in rows] == [
            (row.prompt.id, row.prompt.text) for row in wanted
        ]
    rows = read_source(Source(str(tmp_path / "splits"), split="other"), QUESTION)
    assert texts(rows) == ["q1?"]
    with pytest.raises(PromptError, match="no split 'test'; it has other, train"):
        read_source(Source(str(tmp_path / "splits"), split="test"), QUESTION)


def test_conditions(jsonl):
    rows = read_source(Source(jsonl, where=["db=db1", "db=db2", "level!=0"]), QUESTION)
    wanted = [row for row in ROWS if row["db"] in ("db1", "db2") and row["level"] != 0]
    assert texts(rows) == [row["question"] for row in wanted] and wanted
    with pytest.raises(PromptError, match="no prompts in it for db=nowhere"):
        read_source(Source(jsonl, where=["db=nowhere"]), QUESTION)
    with pytest.raises(PromptError, match="'level' is no condition"):
        read_source(Source(jsonl, where=["level"]), QUESTION)
    with pytest.raises(PromptError, match=r"line 1: there is no column 'x'; there are: db, ques"):
        read_source(Source(jsonl, where=["x=1"]), QUESTION)


def test_holdout_splits_by_group_and_not_by_row(jsonl):
    parts = {}
    for take in ("train", "holdout"):
        source = Source(jsonl, holdout_by="db", holdout_share=0.5, take=take)
        chosen = texts(read_source(source, QUESTION))
        parts[take] = {row["db"]: row for row in ROWS if row["question"] in chosen}
        assert len(chosen) == 4 * len(parts[take])  # whole groups of four
    assert set(parts["train"]) | set(parts["holdout"]) == {row["db"] for row in ROWS}
    assert not set(parts["train"]) & set(parts["holdout"])
    assert parts["train"] and parts["holdout"]
    with pytest.raises(PromptError, match="needs the column to hold out by"):
        Source(jsonl, take="holdout")
    with pytest.raises(PromptError, match="holdout_share must lie between 0 and 1, not 0"):
        Source(jsonl, holdout_by="db")


@given(st.integers(0, 10**9), st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_a_larger_share_holds_out_more_of_the_same(value, share, more):
    assert is_held_out(value, share) <= is_held_out(value, share + more)
    assert is_held_out(value, share) == is_held_out(str(value), share)


def test_share_of_values_held_out():
    held = sum(is_held_out(f"database_{number}", 0.3) for number in range(2000))
    assert 540 <= held <= 660  # three standard deviations are 61


def test_shuffle_is_seeded_and_before_the_limit(jsonl):
    first = texts(read_source(Source(jsonl, shuffle_seed=1, limit=5), QUESTION))
    assert first == texts(read_source(Source(jsonl, shuffle_seed=1, limit=5), QUESTION))
    everything = texts(read_source(Source(jsonl, shuffle_seed=1), QUESTION))
    assert first == everything[:5] != [row["question"] for row in ROWS][:5]
    assert sorted(everything) == sorted(row["question"] for row in ROWS)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_chats_end_at_the_last_user_turn(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    path = write(tmp_path / "chats.jsonl", {"messages": turns})
    prompt = read_source(Source(path), Columns("messages"))[0].prompt
    assert prompt.text == "c" and list(prompt.before) == turns[:3]
    examples = FewShot(turns=[{"role": "user", "content": "x"}])
    assert [turn["content"] for turn in examples.apply(prompt).before] == ["s", "x", "a", "b"]
    path = write(tmp_path / "bad.jsonl", {"messages": turns[2:3]})
    with pytest.raises(PromptError, match="no turn of the user"):
        read_source(Source(path), Columns("messages"))
    path = write(tmp_path / "bad.jsonl", {"messages": ["a"]})
    with pytest.raises(PromptError, match="a turn of a chat is"):
        read_source(Source(path), Columns("messages"))


def test_few_shot(jsonl, tmp_path):
    columns = Columns(template="{schema}: {question}")
    file = write(tmp_path / "shots.jsonl", {"schema": "S", "question": "Q", "answer": "A"})
    examples = read_few_shot(file, columns)
    prompt = examples.apply(read_source(Source(jsonl), columns)[0].prompt)
    assert list(prompt.before) == [
        {"role": "user", "content": "S: Q"},
        {"role": "assistant", "content": "A"},
    ]
    text = tmp_path / "front.txt"
    text.write_text("Q: 1+1\nA: 2\n\n")
    prompt = read_few_shot(text, columns).apply(read_source(Source(jsonl), columns)[0].prompt)
    assert prompt.text == "Q: 1+1\nA: 2\n\nt0: q0?" and not prompt.before
    file = write(tmp_path / "shots.jsonl", {"schema": "S", "question": "Q"})
    with pytest.raises(PromptError, match='line 1: no answer under "response" or "answer"'):
        read_few_shot(file, columns)
    text.write_text("\n")
    with pytest.raises(PromptError, match="there is nothing in it"):
        read_few_shot(text, columns)


def test_earlier_turns_need_a_template(jsonl):
    from tests.decoding.tokenizer import letters_tokenizer

    prompt = FewShot(turns=[{"role": "user", "content": "x"}]).apply(
        read_source(Source(jsonl), QUESTION)[0].prompt
    )
    with pytest.raises(PromptError, match="earlier turns need a chat template"):
        encode(letters_tokenizer(), prompt)


def test_brought_responses(tmp_path):
    rows = [{"prompt": "a", "r": "text"}, {"prompt": "b", "r": [3, 4]}]
    path = write(tmp_path / "r.jsonl", *rows)
    assert [r.response for r in read_source(Source(path), Columns(response="r"))] == [
        "text", [3, 4],
    ]  # fmt: skip
    for bad in (None, [1, "x"], {"a": 1}, 3, [True]):
        path = write(tmp_path / "r.jsonl", {"prompt": "a", "r": bad})
        with pytest.raises(PromptError, match="neither text nor a list of token ids"):
            read_source(Source(path), Columns(response="r"))


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"question": "a"}, Columns(), r"line 1: there is no column 'prompt'; there are: question"),
        ({"prompt": 3}, Columns(), "'prompt' is a int, neither text nor a chat"),
        ({"prompt": " "}, Columns(), "line 1: the prompt is empty"),
        ({"a": "x"}, Columns(template="{a} {b}"), "there is no column 'b'"),
        ({"a": "x"}, Columns(template="no fields"), "names no {column}"),
        ({"a": "x"}, Columns(template="{a"), "the prompt template '{a': "),
        (["x"], Columns(), "expected an object"),
    ],
)
def test_bad_rows(tmp_path, row, columns, message):
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(PromptError, match=message):
        read_source(Source(path), columns)


def test_bad_sources(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(PromptError, match="no prompts in it"):
        read_source(Source(str(empty)), QUESTION)
    path = write(tmp_path / "twice.jsonl", *[{"id": 7, "prompt": "a"}] * 2)
    with pytest.raises(PromptError, match=r"line 2: the id '7' is that of .*line 1 too"):
        read_source(Source(path), Columns())
    for name in ("./nowhere", str(tmp_path / "no.parquet")):
        with pytest.raises(PromptError, match="there is no file or folder"):
            read_source(Source(name), QUESTION)
    text = tmp_path / "prompts.txt"
    text.write_text("x")
    with pytest.raises(PromptError, match=r"a file of prompts ends in \.jsonl"):
        read_source(Source(str(text)), QUESTION)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"no parquet")
    with pytest.raises(PromptError, match="cannot read the data set"):
        read_source(Source(str(broken)), QUESTION)
