"""The gated adapter's benchmarks: they run on tiny models and can be written down."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.adapter import gate_cost, held_out, report
from cllm import GatedAdapter
from cllm.tuning import tune
from tests.decoding.tiny_models import prompts, tiny_model
from tests.one_thread import one_thread

__all__ = ["one_thread"]


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    """Fewer windows to tune over."""
    for name, value in (("sizes", (2, 4)), ("pairs", ((2, 4),)), ("rounds", 1), ("repeats", 1)):
        monkeypatch.setitem(tune.__wrapped__.__kwdefaults__, name, value)


@pytest.fixture
def adapter(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    return GatedAdapter.random(model, 2, scale=0.5).save(tmp_path / "adapter")


@pytest.fixture
def arguments(base, adapter, tasks, results, tmp_path):
    return (
        *("--base", base, "--adapter", adapter, "--tasks", tasks),
        *("--data", f"talk={tmp_path / 'sums.jsonl'}", "--work", tmp_path / "work"),
        *("--block-size", 5, "--verify-size", 3, "--batch-size", 2, "--clock-prompts", 1),
        *("--tune-prompts", 1, "--tune-tokens", 4, "--record", "cpu"),
    )


def never(*_, **__):
    raise AssertionError("run again")


def test_held_out(monkeypatch, run, base, arguments, results, tmp_path):
    run(held_out, *arguments)
    path = results / "cpu" / "adapter_held_out.json"
    record = json.loads(path.read_text())
    names = [held_out.HUGGINGFACE, held_out.PLAIN, held_out.GATED]
    assert record["window"] == {"block_size": 5, "verify_size": 3}
    assert record["adapter"]["metadata"]["gated"] is True
    for task in record["tasks"].values():
        assert task["prompts"] == 2
        for counted in task["counted"].values():
            # the adapter is random, the text is the base's all the same
            assert counted["tokens_per_forward"] >= 1.0
            assert counted["texts"] == 2 and counted["mismatches"] == counted["near_ties"] == 0
        assert list(task["speed"]) == ["float32", "bfloat16"]
        for dtype, speed in task["speed"].items():
            assert list(speed) == names
            windows = record["sizes"][dtype]
            for name, found in speed.items():
                assert found["window"] == windows.get(name)
                assert found["texts"] == 1
                assert found["tokens_per_second"]["median"] > 0
                assert dtype != "float32" or found["mismatches"] == 0
            assert speed[names[0]]["ratio_to_huggingface"]["median"] == 1.0
            assert speed[names[0]]["tokens_per_forward"] == 1.0
    assert record["sizes"]["float32"][held_out.GATED] == {"block_size": 4, "verify_size": 2}

    # all that is finished is kept
    for name in ("decode_texts", "tuned"):
        monkeypatch.setattr(held_out, name, never)
    monkeypatch.setattr(held_out.Clock, "__call__", never)
    run(held_out, *arguments)
    again = json.loads(path.read_text())
    assert again["tasks"] == record["tasks"] and again["sizes"] == record["sizes"]
    # for these weights only, but what is the base's own for every adapter
    other = GatedAdapter.random(AutoModelForCausalLM.from_pretrained(base), 2, seed=1)
    other.save(tmp_path / "adapter")

    def only_gated(*args, adapter, **options):
        assert adapter is not None
        raise AssertionError("run again")

    monkeypatch.setattr(held_out, "decode_texts", only_gated)
    monkeypatch.setattr(held_out, "huggingface", never)
    with pytest.raises(AssertionError, match="run again"):
        run(held_out, *arguments)
    monkeypatch.undo()

    page = written(results, tmp_path)
    assert "| sums | 2 | 12 | Jacobi, gated adapter |" in page
    assert "| 2 of 2 |" in page and "n = 5, v = 3 (plain: n alone)" in page
    assert "Against the clock in bfloat16, the first 1 prompts of a task" in page and page.endswith(
        "below\n"
    )


def test_texts_that_differ_are_looked_at():
    model = tiny_model("llama")
    ids = prompts([6])["input_ids"]
    prompt = ids[0].tolist()
    text = model.generate(ids, do_sample=False, max_new_tokens=6)[0, 6:].tolist()
    other = [*text[:3], (text[3] + 1) % 60 + 3, *text[4:]]
    assert held_out.compared(model, [prompt], [text], [text]) == {
        "texts": 1, "mismatches": 0, "near_ties": 0,
    }  # fmt: skip
    found = held_out.compared(model, [prompt] * 2, [other, text], [text, text])
    assert found == {"texts": 2, "mismatches": 1, "near_ties": 0}
    assert report.same(found) == "1 of 2 (0 near-ties, 1 wrong)"
    # one logit for all tokens: every choice is a tie
    flat = AutoModelForCausalLM.from_config(model.config).eval()
    with torch.no_grad():
        flat.get_output_embeddings().weight.zero_()
    found = held_out.compared(flat, [prompt], [other], [text])
    assert report.same(found) == "0 of 1 (1 near-ties, 0 wrong)"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_cost(run, base, results, tmp_path, dtype):
    run(
        gate_cost, "--base", base, "--rank", 3, "--dtype", dtype, "--sizes", "2,3", "--context", 9,
        "--tokens", 40, "--rounds", 2, "--forwards", 1, "--record", "cpu",
    )  # fmt: skip
    record = json.loads((results / "cpu" / f"gate_cost_{dtype}.json").read_text())
    assert [entry["rows"] for entry in record["sizes"]] == [4, 6]
    for entry in record["sizes"]:
        assert all(value["median"] > 0 for value in entry["milliseconds"].values())
        assert set(entry["ratio"]) == {"twice", "gated"}
    memory, model = record["memory"], AutoModelForCausalLM.from_pretrained(base)
    config = model.config
    parameters = memory["adapter_parameters"]
    assert parameters == GatedAdapter.random(model, 3).parameters
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    assert memory["adapter_bytes"] == parameters * size
    # multiplied with in the model's dtype; found by a table of addresses, instead of one without
    assert memory["adapter_bytes_while_decoding"] == parameters * size
    plain, gated = memory["cache"]["plain"], memory["cache"]["gated"]
    assert gated["slots"] - plain["slots"] == memory["n"] == 3
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * head * size
    assert plain["bytes_per_slot"] == gated["bytes_per_slot"] == each
    page = written(results, tmp_path)
    assert f"| {dtype} | 3 |" in page and "3 of 55" in page


def written(results, tmp_path) -> str:
    """The page that the report makes of an empty one."""
    page = tmp_path / "results.md"
    page.write_text("above\n{}\n{}\nbelow\n".format(*report.MARKERS))
    report.main(results, tmp_path)
    return page.read_text()


def test_no_record_no_number(tmp_path):
    assert "Nothing has been recorded yet." in written(tmp_path / "nowhere", tmp_path)


def test_committed_records_are_what_the_page_says(tmp_path):
    page = (report.DOCS / "results.md").read_text()
    (tmp_path / "results.md").write_text(page)
    report.main(docs=tmp_path)
    assert (tmp_path / "results.md").read_text() == page
