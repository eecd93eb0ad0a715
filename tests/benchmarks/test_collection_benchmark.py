"""The benchmark of collecting runs on a tiny model, and its three ways agree."""

from __future__ import annotations

import json

from benchmarks.training import collection

from ..decoding.tiny_models import tiny_model
from ..decoding.tokenizer import letters_tokenizer
from ..one_thread import one_thread

__all__ = ["one_thread"]


def test_a_small_run(tmp_path):
    tiny_model("mistral").save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    record = collection.run(
        ["--model", str(tmp_path), "--tokens", "22", "--block-size", "5", "--batches", "1,3",
         "--rounds", "2", "--prompt-tokens", "30"]
    )  # fmt: skip
    assert json.loads(json.dumps(record)) is not None
    for size, batch in zip((1, 3), record["batches"], strict=True):
        assert batch["responses"] == size and batch["blocks"] == 5 * size
        assert batch["blocks_that_differ"] == 0 and batch["states_per_block"] > 1
        assert all(seconds["median"] > 0 for seconds in batch["seconds"].values())
        assert all(gain["median"] > 0 for gain in batch["gain_over"].values())
    for name in ("date", "device", "torch", "commit"):
        assert record[name]
