"""The quality bound: which evaluation is the best, and when to stop."""

from __future__ import annotations

import json

import pytest

from cllm.training.quality import QualityBound, QualityWatch
from cllm.training.trainer import ConsistencyTrainer

from .runs import EVAL_PROMPTS


def metrics(speed, nll=0.3, repetition=0.02):
    return {
        "tokens_per_forward": speed,
        "nll_under_base": nll,
        "base_nll": 0.3,
        "repetition": repetition,
        "base_repetition": 0.02,
    }


def test_the_bound():
    bound = QualityBound(max_nll_increase=0.05, repetition_slack=0.01)
    assert bound.violations(metrics(1.0, nll=0.35, repetition=0.03)) == []
    assert bound.violations(metrics(1.0, nll=0.351)) == ["NLL under the base 0.351 > 0.350"]
    assert bound.violations(metrics(1.0, repetition=0.04)) == ["repetition 0.040 > 0.030"]
    assert len(bound.violations(metrics(1.0, nll=0.9, repetition=0.9))) == 2
    assert bound.violations(metrics(1.0, nll=float("nan")))
    with pytest.raises(KeyError):
        bound.violations({"tokens_per_forward": 2.0})


def test_the_fastest_inside_the_bound_is_the_best():
    watch = QualityWatch(QualityBound(0.05, 0.01), patience=None)
    sequence = [
        metrics(1.2),
        metrics(9.0, nll=0.8),
        metrics(1.5, nll=0.34),
        metrics(1.4),
        metrics(8.0, repetition=0.5),
        metrics(1.5),
    ]
    verdicts = [watch.judge(step, values) for step, values in enumerate(sequence)]
    assert [verdict.best for verdict in verdicts] == [True, False, True, False, False, False]
    assert [verdict.inside for verdict in verdicts] == [True, False, True, True, False, True]
    assert not any(verdict.stop for verdict in verdicts)
    assert (watch.best_step, watch.best_tokens_per_forward) == (2, 1.5)


def test_stops_after_so_many_evaluations_outside_in_a_row():
    watch = QualityWatch(QualityBound(0.05, 0.01), patience=2)
    bad, good = metrics(3.0, nll=0.9), metrics(1.1)
    stops = [watch.judge(step, values).stop for step, values in enumerate([bad, good, bad, bad])]
    assert stops == [False, False, False, True]


def test_state_goes_through_json():
    watch = QualityWatch(QualityBound(), patience=2)
    empty = QualityWatch(QualityBound(), patience=2)
    empty.restore(json.loads(json.dumps(watch.state())))
    assert empty == watch and empty.judge(1, metrics(0.5)).best
    watch.judge(1, metrics(1.3))
    watch.judge(2, metrics(4.0, nll=2.0))
    again = QualityWatch(QualityBound(), patience=2)
    again.restore(json.loads(json.dumps(watch.state())))
    assert again == watch
    assert not again.judge(3, metrics(1.2)).best


class Scripted(ConsistencyTrainer):
    """The real trainer and its real decoding; the figures that are judged are given."""

    script: list

    def _judge(self, found):
        found.update(self.script.pop(0))
        return super()._judge(found)


def scripted(make_trainer, script, **settings):
    trainer = make_trainer(
        max_steps=len(script),
        eval_strategy="steps",
        eval_steps=1,
        prompts=EVAL_PROMPTS[:1],
        eval_max_new_tokens=4,
        **settings,
    )
    trainer.__class__ = Scripted
    trainer.script = list(script)
    return trainer


def test_the_best_model_is_kept_at_once_and_whole(make_trainer, tmp_path):
    script = [metrics(1.2), metrics(1.6), metrics(5.0, nll=2.0), metrics(1.5)]
    trainer = scripted(make_trainer, script, stop_on_quality=False)
    trainer.train()
    best = tmp_path / "out" / "best_checkpoint"
    kept = json.loads((best / "metrics.json").read_text())
    assert kept["step"] == 2 and kept["tokens_per_forward"] == 1.6
    assert trainer.watch.best_step == 2
    assert (best / "model.safetensors").is_file() and (best / "tokenizer.json").is_file()
    assert json.loads((best / "cllm_recipe.json").read_text())["step"] == 2
    history = [entry for entry in trainer.state.log_history if "eval_inside_bound" in entry]
    assert [entry["eval_inside_bound"] for entry in history] == [1, 1, 0, 1]


def test_training_stops_when_quality_stays_outside(make_trainer, tmp_path):
    script = [metrics(2.0, nll=0.9)] * 6
    trainer = scripted(make_trainer, script, quality_patience=3)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.stopped_because == ["NLL under the base 0.900 > 0.350"]
    assert trainer.watch.best_step is None
    assert not (tmp_path / "out" / "best_checkpoint").exists()
    with_flag = scripted(make_trainer, script, quality_patience=3, stop_on_quality=False)
    with_flag.train()
    assert with_flag.state.global_step == 6 and with_flag.stopped_because is None
