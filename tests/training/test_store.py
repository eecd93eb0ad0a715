"""Trajectories on disk: what was written comes back, and nothing else passes for it."""

from __future__ import annotations

import errno
import json
import pickle
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm.files import write_atomically
from cllm.training.examples import BlockStates, TrainingExample
from cllm.training.store import (
    Manifest,
    StoreError,
    load_trajectories,
    shard_name,
    tokenizer_hash,
    versions,
    write_shard,
)

from ..decoding.tokenizer import letters_tokenizer


def example(number, n=2):
    blocks = [BlockStates([[9, 9], [4, 9], [4, number]]), BlockStates([[1], [8]])]
    return TrainingExample(f"q{number}é", [1, 2, number], [4, number, 6, 7, 8], n, blocks, [0, 2])


def filled(folder, shards=(20, 3), n=2, hash="abc"):
    """A folder of trajectories, and its rows."""
    examples = [example(number, n) for number in range(sum(shards))]
    entries, start = [], 0
    for number, rows in enumerate(shards):
        path = folder / shard_name(number)
        entries.append(write_shard(path, examples[start : start + rows]))
        start += rows
    manifest = Manifest(
        "model", "f00d", hash, n, "prompt", 3, versions(), {"system": None}, entries,
        {"repeats itself": 4}, {"responses": 23}, complete=True,
    )  # fmt: skip
    manifest.save(folder)
    return examples, manifest


def test_round_trip(tmp_path):
    examples, manifest = filled(tmp_path)
    data = load_trajectories(tmp_path)
    assert len(data) == 23
    assert [data[index] for index in range(23)] == examples
    assert [data[index] for index in (22, 0, 19, 20, -1)] == [
        examples[index] for index in (22, 0, 19, 20, 22)
    ]
    assert data.manifest == manifest and data.manifest.rows == 23
    assert set(manifest.versions) == {"torch", "transformers", "cllm-kernels"}
    for index in (23, -24):
        with pytest.raises(IndexError, match=f"row {index} of 23"):
            data[index]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json", "part-00000.parquet", "part-00001.parquet",
    ]  # fmt: skip


token = st.integers(0, 2**31 - 1)


@given(
    rows=st.lists(
        st.builds(
            TrainingExample,
            id=st.text(st.characters(exclude_categories=["Cs"])),
            prompt=st.lists(token, max_size=5),
            response=st.lists(token, max_size=5),
            block_size=st.integers(1, 64),
            blocks=st.lists(
                st.builds(
                    BlockStates,
                    st.tuples(st.lists(token, min_size=1, max_size=4)).map(
                        lambda state: [[0] * len(state[0]), state[0]]
                    ),
                ),
                max_size=3,
            ),
            block_index=st.lists(st.integers(0, 99), max_size=3),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_any_rows_come_back(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    shard = write_shard(folder / shard_name(0), rows)
    Manifest("m", None, "h", 2, "prompt", 0, shards=[shard]).save(folder)
    data = load_trajectories(folder)
    assert [data[index] for index in range(len(data))] == rows


def test_columns_are_for_other_programs_too(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    examples, _ = filled(tmp_path)
    row = parquet.read_table(tmp_path / shard_name(0)).to_pylist()[5]
    assert row["id"] == "q5é" and row["response"] == examples[5].response
    assert row["iterations"] == [2, 1]
    assert row["first_divergence"] == [[0, 1, 2], [0, 1]]
    assert row["states"] == [block.states for block in examples[5].blocks]


def test_workers_of_a_data_loader(tmp_path):
    examples, _ = filled(tmp_path)
    data = load_trajectories(tmp_path)
    assert data[3] == examples[3]  # so that files are open when it is pickled
    assert pickle.loads(pickle.dumps(data))[21] == examples[21]
    loader = torch.utils.data.DataLoader(data, batch_size=6, num_workers=2, collate_fn=list)
    assert [row for batch in loader for row in batch] == examples


def test_folders_are_joined(tmp_path):
    one, _ = filled(tmp_path / "one", (3,))
    other, _ = filled(tmp_path / "other", (2, 2))
    data = load_trajectories(tmp_path / "one", tmp_path / "other")
    assert [data[index] for index in range(7)] == one + other
    assert len(data.manifests) == 2


def test_folders_that_do_not_fit(tmp_path):
    filled(tmp_path / "one")
    filled(tmp_path / "other", n=4)
    filled(tmp_path / "third", hash="def")
    with pytest.raises(StoreError, match=r"different block sizes \(2 and 4\), so they cannot be"):
        load_trajectories(tmp_path / "one", tmp_path / "other")
    with pytest.raises(StoreError, match="different tokenizers, so they cannot be joined"):
        load_trajectories(tmp_path / "one", tmp_path / "third")
    with pytest.raises(StoreError, match="no folder of trajectories was given"):
        load_trajectories()


def damaged(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit(tmp_path):
    filled(tmp_path)
    damaged(tmp_path / shard_name(1), 100)
    with pytest.raises(StoreError, match=r"part-00001.parquet is damaged: its checksum is not .*;"):
        load_trajectories(tmp_path)


def test_a_truncated_shard(tmp_path):
    _, manifest = filled(tmp_path)
    path = tmp_path / shard_name(0)
    path.write_bytes(path.read_bytes()[:-9])
    size = manifest.shards[0].size
    with pytest.raises(StoreError, match=f"damaged: {size - 9} bytes instead of {size}; delete it"):
        load_trajectories(tmp_path, checksum=False)


def test_a_missing_shard(tmp_path):
    filled(tmp_path)
    (tmp_path / shard_name(1)).unlink()
    with pytest.raises(StoreError, match=r"part-00001.parquet is missing, but the manifest names"):
        load_trajectories(tmp_path)


def test_a_shard_that_the_manifest_does_not_know(tmp_path):
    filled(tmp_path)
    write_shard(tmp_path / shard_name(7), [example(1)])
    with pytest.raises(StoreError, match=r"part-00007.parquet is not in manifest.json: .* again"):
        load_trajectories(tmp_path)


def adopted(folder, path, rows):
    """Name any file in the manifest, with its right checksum."""
    import hashlib

    content = path.read_bytes()
    manifest = Manifest.load(folder)
    shard = replace(
        manifest.shards[0],
        name=path.name,
        rows=rows,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    replace(manifest, shards=[shard]).save(folder)


def test_foreign_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    filled(tmp_path, (3,))
    path = tmp_path / shard_name(0)
    adopted(tmp_path, path, rows=2)
    with pytest.raises(StoreError, match="has 3 rows, the manifest says 2"):
        load_trajectories(tmp_path)
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    adopted(tmp_path, path, rows=2)
    with pytest.raises(StoreError, match="holds no trajectories: its columns are text instead of"):
        load_trajectories(tmp_path)
    path.write_bytes(b"PAR1 nothing of the kind PAR1")
    adopted(tmp_path, path, rows=2)
    with pytest.raises(StoreError, match="is no readable Parquet file: "):
        load_trajectories(tmp_path)


def test_manifests_that_cannot_be_read(tmp_path):
    with pytest.raises(StoreError, match=r"has no manifest.json, .*`cllm collect` makes one"):
        load_trajectories(tmp_path)
    path = tmp_path / "manifest.json"
    for content, message in (
        (b"{", "manifest.json is damaged: "),
        (b"\xff", "manifest.json is damaged: "),
        (b"[]", "it is not a manifest of trajectories"),
        (b'{"format": 99}', "it has the format 99, this version of cllm reads 1; update cllm"),
        (b'{"format": 1}', "a field is missing or has the wrong form"),
        (b'{"format": 1, "shards": [{"name": "x"}]}', "a field is missing or has the wrong form"),
    ):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=message):
            load_trajectories(tmp_path)


def test_fields_of_later_versions_are_skipped(tmp_path):
    _, manifest = filled(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unheard_of": 1}))
    assert load_trajectories(tmp_path).manifest == manifest


def test_no_rows(tmp_path):
    Manifest("m", None, "h", 2, "prompt", 0, dropped={"too long": 5}).save(tmp_path)
    with pytest.raises(StoreError, match="holds no trajectories: every prompt was dropped"):
        load_trajectories(tmp_path)
    with pytest.raises(StoreError, match="a shard needs at least one example"):
        write_shard(tmp_path / shard_name(0), [])
    assert not list(tmp_path.glob("part-*"))


def test_another_tokenizer(tmp_path):
    tokenizer = letters_tokenizer()
    filled(tmp_path, hash=tokenizer_hash(tokenizer))
    assert len(load_trajectories(tmp_path, tokenizer=tokenizer)) == 23
    with pytest.raises(StoreError, match=r"not the one that .* was collected with \(model model\)"):
        load_trajectories(tmp_path, tokenizer=changed())


def changed():
    """The letters tokenizer with two pieces exchanged."""
    from transformers import PreTrainedTokenizerFast

    from ..decoding.tokenizer import letters_tokenizer as original

    backend = json.loads(original().backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def test_what_counts_for_the_tokenizers_hash(tmp_path):
    import copy

    tokenizer = letters_tokenizer()
    value = tokenizer_hash(tokenizer)
    assert len(value) == 64
    other = copy.deepcopy(tokenizer)
    other(["a", "abc"], padding=True, truncation=True, max_length=2)
    other.chat_template = "{{ messages }}"
    assert tokenizer_hash(other) == value
    other.add_tokens(["<tool>"])
    assert tokenizer_hash(other) != value
    assert tokenizer_hash(changed()) != value
    tokenizer.save_pretrained(tmp_path)
    program = (
        "import sys; from transformers import AutoTokenizer; "
        "from cllm.training.store import tokenizer_hash; "
        "print(tokenizer_hash(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == value


def test_an_empty_normalizer_is_none():
    """transformers 5.10 writes a sequence of nothing, 5.24 none, for the same file."""
    tokenizer = letters_tokenizer()
    whole = json.loads(tokenizer.backend_tokenizer.to_str())

    class Wrote:
        def __init__(self, **changes):
            self.backend_tokenizer = self
            self.added_tokens_decoder = tokenizer.added_tokens_decoder
            self.to_str = lambda: json.dumps(whole | changes)

    nothing = {"type": "Sequence", "normalizers": []}
    lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    assert tokenizer_hash(Wrote(normalizer=None)) == tokenizer_hash(Wrote(normalizer=nothing))
    assert tokenizer_hash(Wrote(normalizer=lower)) != tokenizer_hash(Wrote(normalizer=None))
    empty = {"type": "Sequence", "pretokenizers": []}
    assert tokenizer_hash(Wrote(pre_tokenizer=None)) == tokenizer_hash(Wrote(pre_tokenizer=empty))


def test_merges_in_both_notations():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def build(merges):
        vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    class Older:
        """Says what a release of tokenizers before 0.20 would have said."""

        def __init__(self, tokenizer):
            text = json.loads(tokenizer.backend_tokenizer.to_str())
            text["model"]["merges"] = [" ".join(pair) for pair in text["model"]["merges"]]
            self.backend_tokenizer = self
            self.added_tokens_decoder = tokenizer.added_tokens_decoder
            self.to_str = lambda: json.dumps(text)

    both, swapped = build([("a", "b"), ("b", "c")]), build([("b", "c"), ("a", "b")])
    assert tokenizer_hash(Older(both)) == tokenizer_hash(both) != tokenizer_hash(swapped)


@pytest.fixture
def small_disk():
    """No file may grow beyond 2000 bytes, as if the disk were full there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing_behind(tmp_path, small_disk):
    path = tmp_path / shard_name(0)
    with pytest.raises(OSError, match=r"too large.*part-00000.parquet") as failure:
        write_shard(path, [example(number) for number in range(40)])
    assert failure.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
    manifest = Manifest("m", None, "h", 2, "prompt", 0)
    manifest.save(tmp_path)
    manifest.settings["long"] = "x" * 3000
    with pytest.raises(OSError, match=r"too large.*manifest.json"):
        manifest.save(tmp_path)
    assert Manifest.load(tmp_path).settings == {}
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_written_durably(tmp_path):
    path = write_atomically(tmp_path / "deep" / "file", b"abc", durable=True)
    assert path.read_bytes() == b"abc" and [path] == list(path.parent.iterdir())
    with pytest.raises(OSError):
        write_atomically(path / "below a file", b"", durable=True)
