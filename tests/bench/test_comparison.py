"""Contenders in processes of their own: who takes part, what a forward reads, what is refused."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import pytest

from cllm.bench import comparison as module
from cllm.bench.comparison import Comparison, NothingToCompare, Plan, bandwidth, weight_bytes
from cllm.bench.contenders import CONTENDERS, EAGER, Setup
from cllm.bench.contest import Contestant, Failed
from cllm.bench.tasks import Kept, Task
from tests.decoding.tiny_models import fresh_model, tiny_model
from tests.one_thread import one_thread

__all__ = ["one_thread"]


@pytest.fixture
def setup(tmp_path):
    fresh_model("llama").save_pretrained(tmp_path / "base")
    return Setup(str(tmp_path / "base"), "float32", "cpu", None, None, None, 4, 64)


def comparison(setup, tmp_path, prompts, **plan):
    task = Task("few", prompts, None, 4)
    lines = []
    plan = Plan(**{"contenders": (EAGER,), "warm_up": 0, "rounds": 1} | plan)
    made = Comparison(
        tiny_model("llama"), [task], setup, plan, Kept(tmp_path / "kept"), tell=lines.append
    )
    return made, lines


def test_what_a_forward_reads():
    tied, untied = tiny_model("gpt2"), fresh_model("llama")
    assert weight_bytes(tied) == sum(p.nbytes for p in tied.parameters())
    embedding = untied.get_input_embeddings().weight
    whole = sum(p.nbytes for p in untied.parameters())
    assert weight_bytes(untied) == whole - embedding.nbytes
    assert bandwidth("cpu") > 1e8


@pytest.mark.slow
def test_a_contender_that_cannot_take_part_says_why(setup):
    for name, reason in (
        ("HuggingFace, draft model", "no draft model was given (--draft)"),
        ("cllm, adapter", "no adapter was given (--adapter)"),
    ):
        one = Contestant(name, setup, 1, [], 4)
        assert one.absent == reason
        one.close()


@pytest.mark.slow
def test_a_process_that_dies_is_named(setup):
    one = Contestant("cllm, one token", setup, 1, [], 4)
    assert one.absent is None and len(one.decode([[3, 4]], 4)["texts"][0]) == 4
    one._process.kill()
    for _ in range(2):
        with pytest.raises(Failed, match="its process ended with code -9"):
            one.decode([[3, 4]], 4)
    one.close()


@pytest.mark.parametrize(
    ("prompts", "plan", "message"),
    [
        ([[3, 4]], {"warm_up": 1}, "few: too few prompts, 1 are for warming up"),
        ([[3, 4]], {"batches": (1, 2)}, "few: 1 prompts are fewer than the largest batch, 2"),
    ],
)
def test_plans_that_do_not_fit_the_prompts(setup, tmp_path, prompts, plan, message):
    with pytest.raises(ValueError, match=message):
        comparison(setup, tmp_path, prompts, **plan)


class Stub:
    """Stands for a process; `answers` are what it does with one batch after the other."""

    def __init__(self, name, answers, absent=None):
        self.name, self.answers, self.absent, self.closed = name, iter(answers), absent, False

    def decode(self, prompts, most):
        answer = next(self.answers)
        if isinstance(answer, str):
            raise Failed(answer)
        texts = [[7] * 4 for _ in prompts]
        return {"texts": texts, "forwards": answer, "first_token": None, "seconds": 2.0,
                "peak_bytes": 5}  # fmt: skip

    def close(self):
        self.closed = True


def test_who_fails_on_the_way_is_left_out_and_named(setup, tmp_path, monkeypatch):
    made, lines = comparison(setup, tmp_path, [[3, 4], [5, 6]])
    stubs = [Stub(EAGER, [4, 4]), Stub("cllm, Jacobi", [2, "no room"])]
    monkeypatch.setattr(made, "contestants", lambda: iter(stubs))
    monkeypatch.setattr(made, "references", lambda task: [[7] * 4, [7, 7, 7, 8]])
    found = made.run()["1"]["few"]
    assert made.failures == {"cllm, Jacobi, batch 1": "no room"}
    assert "cllm, Jacobi" not in found and list(found)[2:] == [EAGER]
    one = found[EAGER]
    assert one["tokens_per_forward"] == 1.0 and one["tokens_per_second"]["median"] == 2.0
    assert one["texts"] == 2 and one["same"] == 1 and one["ratio"]["median"] == 1.0
    assert all(stub.closed for stub in stubs) and "cllm, Jacobi, batch 1: no room" in lines
    # what is finished is kept, and taken from there
    again, _ = comparison(setup, tmp_path, [[3, 4], [5, 6]])
    monkeypatch.setattr(again, "contestants", lambda: iter([Stub(EAGER, ["again", "again"])]))
    monkeypatch.setattr(again, "references", lambda task: [[7] * 4, [7, 7, 7, 8]])
    assert again.run()["1"]["few"][EAGER] == one
    # but not by other code
    monkeypatch.setattr(module, "code_digest", lambda: "other")
    other, _ = comparison(setup, tmp_path, [[3, 4], [5, 6]])
    monkeypatch.setattr(other, "contestants", lambda: iter([Stub(EAGER, ["anew", "anew"])]))
    monkeypatch.setattr(other, "references", lambda task: [[7] * 4, [7, 7, 7, 8]])
    with pytest.raises(NothingToCompare, match="anew"):
        other.run()


def test_a_size_may_be_given_fewer_batches(setup, tmp_path, monkeypatch):
    prompts = [[3, 4], [5, 6], [7, 8]]
    made, _ = comparison(setup, tmp_path, prompts, batches=(1, 2), most={1: 2})
    stubs = [Stub(EAGER, [4, 4, 4]), Stub("cllm, Jacobi", [2, 2, 2])]
    monkeypatch.setattr(made, "contestants", lambda: iter(stubs))
    monkeypatch.setattr(made, "references", lambda task: [[7] * 4, [7, 7, 7, 8], [7] * 4])
    verified = []
    monkeypatch.setattr(
        module, "verify", lambda *given, **_: verified.append(given[1]) or Namespace(ok=True)
    )
    found = made.run()
    assert found["1"]["few"]["prompts"] == 2 and found["2"]["few"]["prompts"] == 2
    for size in "12":
        assert found[size]["few"]["cllm, Jacobi"]["same"] == 1
        assert found[size]["few"]["cllm, Jacobi"]["near_ties"] == 1
    # one text of one prompt, whoever decoded it and in whichever batch
    assert [tokens.tolist() for tokens in verified] == [[[5, 6, 7, 7, 7, 7]]]


def test_what_is_finished_of_a_run_that_was_ended(setup, tmp_path, monkeypatch):
    made, _ = comparison(setup, tmp_path, [[3, 4], [5, 6]], contenders=(EAGER, "cllm, Jacobi"))
    made.tasks.append(replace(made.tasks[0], name="more"))
    assert made.finished() == {}

    class Ended(Stub):
        def decode(self, prompts, most):
            try:
                return super().decode(prompts, most)
            except StopIteration:
                raise KeyboardInterrupt from None

    stubs = [Ended(EAGER, [4, 4, 4]), Ended("cllm, Jacobi", [2, 2])]
    monkeypatch.setattr(made, "contestants", lambda: iter(stubs))
    monkeypatch.setattr(made, "references", lambda task: [[7] * 4] * 2)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert all(stub.closed for stub in stubs)
    found = made.finished()
    assert list(found) == ["1"] and list(found["1"]) == ["few"]
    assert found["1"]["few"]["cllm, Jacobi"]["tokens_per_forward"] == 2.0
    # who has not finished a task is not in it
    made.kept.find = lambda name, key, own=made.kept.find: (
        None if "cllm, Jacobi" in key and name.endswith("-1") else own(name, key)
    )
    assert "cllm, Jacobi" not in made.finished()["1"]["few"]


def test_without_huggingface_there_is_nothing_to_compare(setup, tmp_path, monkeypatch):
    made, _ = comparison(setup, tmp_path, [[3, 4]])
    stub = Stub(EAGER, ["no room"])
    monkeypatch.setattr(made, "contestants", lambda: iter([stub]))
    with pytest.raises(NothingToCompare, match="HuggingFace, batch 1: no room"):
        made.run()
    assert stub.closed


def test_names_say_whose_they_are():
    assert next(iter(CONTENDERS)) == EAGER
    assert all(name.startswith(("HuggingFace", "flashspec", "cllm", "CLLM")) for name in CONTENDERS)


def test_on_a_gpu_who_tunes_itself_has_it_to_itself(setup, tmp_path, monkeypatch):
    names = (EAGER, "cllm, automatic", "cllm, Jacobi")
    made, _ = comparison(setup, tmp_path, [[3, 4]], contenders=names)
    made.setup = replace(setup, device="cuda")
    done = []
    monkeypatch.setattr(made, "references", lambda task: done.append(task.name))

    def start(name, *_):
        done.append(name)
        return Stub(name, [])

    monkeypatch.setattr(module, "Contestant", start)
    started = made.contestants()
    assert next(started).name == EAGER
    assert sorted(done) == sorted([EAGER, "cllm, Jacobi", "few"])
    assert [one.name for one in started] == list(names[1:])
    assert done[-1] == "cllm, automatic"


def test_who_was_started_is_ended_when_the_references_fail(setup, tmp_path, monkeypatch):
    made, _ = comparison(setup, tmp_path, [[3, 4]], contenders=(EAGER, "cllm, Jacobi"))
    made.setup = replace(setup, device="cuda")
    closed = []

    class Closed(Stub):
        def close(self):
            closed.append(self.name)

    def fail(task):
        raise RuntimeError("no memory")

    monkeypatch.setattr(made, "references", fail)
    monkeypatch.setattr(module, "Contestant", lambda name, *_: Closed(name, []))
    with pytest.raises(RuntimeError, match="no memory"):
        list(made.contestants())
    assert sorted(closed) == sorted([EAGER, "cllm, Jacobi"])
