"""Checkpoints that are damaged or finished: named, or passed over, before any training."""

from __future__ import annotations

import pytest

from cllm.training.checkpoints import STATE_FILE, CheckpointError, last_checkpoint


@pytest.fixture
def finished(make_trainer):
    """The folder of a run of two steps, each with a checkpoint."""
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer.output_folder


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_finished_run_does_not_train_on(make_trainer, finished):
    before = (finished / "checkpoint-2" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="has all 2 steps of the run; raise max_steps"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=True)
    assert (finished / "checkpoint-2" / "model.safetensors").read_bytes() == before
    more = make_trainer(max_steps=3)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 3


def test_the_newest_whole_one_is_the_last(finished):
    assert last_checkpoint(finished) == finished / "checkpoint-2"
    cut(finished / "checkpoint-2" / "trainer_state.json")
    assert last_checkpoint(finished) == finished / "checkpoint-1"


def test_a_damaged_one_that_was_asked_for(make_trainer, finished):
    cut(finished / "checkpoint-2" / "trainer_state.json")
    with pytest.raises(CheckpointError, match="checkpoint-2 is not a whole checkpoint"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=str(finished / "checkpoint-2"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_FILE]
)
def test_files_that_cannot_be_read_name_the_checkpoint(make_trainer, finished, name):
    path = finished / "checkpoint-2" / name
    cut(path)
    with pytest.raises(CheckpointError, match="checkpoint-2") as error:
        make_trainer(max_steps=4).train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)


def test_a_state_without_its_parts(make_trainer, finished):
    (finished / "checkpoint-2" / STATE_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="does not hold the state of a training"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=True)
