"""The trainer: exact under accumulation and interruption, folders that others load, bad losses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from cllm.training.checkpoints import CheckpointError, recover_folder, replaced_folder
from cllm.training.store import StoreError, load_trajectories
from cllm.training.trainer import NonFiniteLossError
from tests.decoding.tiny_models import fresh_model
from tests.decoding.tokenizer import letters_tokenizer

from .runs import (
    EVAL_PROMPTS,
    assert_same_parameters,
    losses,
    parameters,
    whole_and_interrupted,
)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_batches_are_one_batch(make_trainer, accumulation):
    # responses end at different lengths, so micro-batches hold different numbers of rows: a mean
    # of their means would be another loss
    # plain gradient descent: Adam would turn the sign of a rounding error into a whole step
    settings = {"optim": "sgd", "learning_rate": 1e-4, "max_steps": 3, "max_grad_norm": 0.0}
    whole = make_trainer(per_device_train_batch_size=4, **settings)
    whole.train()
    parts = make_trainer(
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    parts.train()
    assert len(losses(whole)) == 3
    for one, other in zip(losses(whole), losses(parts), strict=True):
        assert other == pytest.approx(one, rel=1e-6)
    assert_same_parameters(parameters(whole), parameters(parts), 1e-6)
    assert whole.meter.state() == parts.meter.state()


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"row_tokens": 256}, 1e-6),
        ({"gradient_checkpointing": True}, 1e-6),
        ({"dataloader_num_workers": 2}, 0),
        # decoding held-out prompts in between takes no random numbers from training
        ({"prompts": EVAL_PROMPTS, "eval_strategy": "steps", "eval_steps": 1}, 0),
    ],
    ids=["packed-rows", "checkpointing", "workers", "evaluation"],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_what_does_not_change_the_losses(make_trainer, settings, tolerance):
    common = {"per_device_train_batch_size": 4, "lora_r": 2, "lora_dropout": 0.0, "max_steps": 3}
    common |= {"optim": "sgd", "learning_rate": 1e-4, "max_grad_norm": 0.0}
    common |= {"stop_on_quality": False}
    if "row_tokens" not in settings:
        # dropout draws by place, and packed rows have other places
        common["lora_dropout"] = 0.2
    plain = make_trainer(**common)
    plain.train()
    other = make_trainer(**common, **settings)
    other.train()
    assert len(losses(plain)) == 3
    for one, two in zip(losses(plain), losses(other), strict=True):
        assert two == pytest.approx(one, rel=tolerance, abs=0)


def test_the_averaged_teacher_moves_after_every_step(make_trainer):
    found = {}
    for name, settings in {
        "self": {"teacher": "self"},
        "moved": {"teacher": "ema", "ema_decay": 0.0},
        "slow": {"teacher": "ema", "ema_decay": 0.99},
        "base": {"teacher": "base"},
    }.items():
        trainer = make_trainer(learning_rate=1e-2, max_steps=3, **settings)
        trainer.train()
        found[name] = [consistency for _, consistency, _ in losses(trainer)]
    # an average that forgets at once is the model itself; one that never moves is the base
    assert found["moved"] == pytest.approx(found["self"], rel=1e-4)
    assert found["slow"][2] != pytest.approx(found["self"][2], rel=1e-3)
    assert found["slow"][2] != pytest.approx(found["base"][2], rel=1e-5)


def test_a_second_run_has_the_same_base_model(make_trainer):
    settings = {"teacher": "base", "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps"}
    trainer = make_trainer(save_steps=1, **settings)
    trainer.train()
    first = losses(trainer)
    # the second half again, by the object that was trained to the end
    trainer.train(resume_from_checkpoint=str(trainer.output_folder / "checkpoint-1"))
    assert losses(trainer) == first


def test_adapters_start_from_the_seed(make_trainer):
    torch.manual_seed(5)
    one = make_trainer(lora_r=2, seed=3)
    torch.manual_seed(6)
    two = make_trainer(lora_r=2, seed=3)
    assert_same_parameters(parameters(one), parameters(two), 0)


def test_another_seed_is_another_run(make_trainer):
    # a check on the tests above: order and states do depend on the seed
    one, two = make_trainer(seed=1), make_trainer(seed=2)
    one.train()
    two.train()
    assert losses(one)[0] != losses(two)[0]


def test_augmented_states_are_trained_on(make_trainer):
    plain = make_trainer(states=8)
    augmented = make_trainer(states=8, augment=0.5)
    again = make_trainer(states=8, augment=0.5)
    rows = [[trainer.train_dataset[row] for row in range(3)] for trainer in (augmented, again)]
    assert rows[0] == rows[1]

    def between(trainer) -> int:
        """States drawn that Jacobi iteration did not come through."""
        found = 0
        for row in range(3):
            drawn, own = trainer.train_dataset[row], trainer.trajectories[row].blocks
            found += sum(
                drawn.example.blocks[block].states[state] not in own[block].states
                for block, state in drawn.picks
            )
        return found

    assert between(plain) == 0 and between(augmented) > 0
    losses_of = [losses(trainer) for trainer in (plain, augmented) if trainer.train()]
    assert losses_of[0] != losses_of[1]


def test_bfloat16_by_autocast_trains_and_evaluates(make_trainer):
    plain = make_trainer(prompts=EVAL_PROMPTS, stop_on_quality=False)
    plain.train()
    trainer = make_trainer(bf16=True, prompts=EVAL_PROMPTS, stop_on_quality=False)
    trainer.train()
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert losses(trainer) != losses(plain)
    assert losses(trainer)[0] == pytest.approx(losses(plain)[0], rel=0.05)


def test_losses_and_quality_reach_tensorboard(make_trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(report_to=["tensorboard"], prompts=EVAL_PROMPTS, max_steps=2)
    trainer.train()
    events = next(path for path in tmp_path.rglob("events.out.tfevents*"))
    record = EventAccumulator(str(events.parent)).Reload()
    names = ("loss", "consistency_loss", "ar_loss", "noisy_tokens", "tokens_per_second")
    assert {f"train/{name}" for name in names} <= set(record.Tags()["scalars"])
    names = ("tokens_per_forward", "exact_match", "nll_under_base", "base_nll", "repetition")
    assert {f"eval/{name}" for name in names} <= set(record.Tags()["scalars"])
    noisy = [event.value for event in record.Scalars("train/noisy_tokens")]
    assert noisy[1] > noisy[0] > 0 and noisy[1] == trainer.meter.total.nominal


def likelihoods(trainer):
    history = trainer.state.log_history
    return [entry["eval_nll_under_base"] for entry in history if "eval_tokens" in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"teacher": "ema", "ema_decay": 0.5, "sampling": "uniform", "states": 2},
        {"teacher": "base", "lora_r": 4, "lora_dropout": 0.1, "gradient_accumulation_steps": 2},
    ],
    ids=["self", "ema", "lora"],
)
def test_interrupted_run_goes_on_as_if_uninterrupted(make_trainer, tmp_path, settings):
    # two batches of the second epoch lie before the interruption, and one epoch ends behind it
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "stop_on_quality": False,
        "prompts": EVAL_PROMPTS[:1],
        "eval_max_new_tokens": 6,
        **settings,
    }
    whole, second = whole_and_interrupted(make_trainer, tmp_path, 7, settings)
    assert second.state.global_step == 9
    assert len(losses(whole)) == 9
    assert losses(second) == losses(whole)
    assert_same_parameters(parameters(whole), parameters(second), 0)
    assert second.meter.state() == whole.meter.state()
    assert second.watch.state() == whole.watch.state()
    evaluations = [
        [
            entry["eval_nll_under_base"]
            for entry in trainer.state.log_history
            if "eval_tokens" in entry
        ]
        for trainer in (whole, second)
    ]
    assert len(evaluations[0]) == 3 and evaluations[0] == evaluations[1]


def test_the_model_is_as_it_was_after_training(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert not any(name == "forward" or "cllm" in name for name in trainer.model.__dict__)
    ids = torch.tensor([[5, 6, 7]])
    assert trainer.model(input_ids=ids).logits.shape == (1, 3, 97)


def test_full_folder_loads_with_plain_transformers(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=0)
    assert (tmp_path / "model" / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("the cat")["input_ids"] == letters_tokenizer()("the cat")["input_ids"]
    recipe = json.loads((tmp_path / "model" / "cllm_recipe.json").read_text())
    assert recipe["arguments"]["ar_weight"] == 10.0 and recipe["step"] == 2
    assert recipe["trajectories"][0]["block_size"] == 8
    assert recipe["versions"]["torch"] and recipe["trained"]["nominal"] > 0


def test_lora_folders_load_with_peft_and_merged_ones_without(make_trainer, tmp_path):
    from peft import PeftModel

    trainer = make_trainer(lora_r=4, max_steps=3, teacher="base", learning_rate=1e-2)
    trainer.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        untrained = fresh_model()(input_ids=ids).logits
    assert (expected - untrained).abs().max() > 1e-2

    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    with_peft = PeftModel.from_pretrained(fresh_model(), tmp_path / "adapter").eval()
    trainer.args.merge_lora = True
    trainer.save_model(str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for folder in ("adapter", "merged"):
        assert (tmp_path / folder / "cllm_recipe.json").is_file()
        assert (tmp_path / folder / "generation_config.json").is_file()
        AutoTokenizer.from_pretrained(tmp_path / folder)
    with torch.no_grad():
        torch.testing.assert_close(with_peft(input_ids=ids).logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        # saving a merged copy leaves the model in training alone
        after = trainer.model(input_ids=ids).logits
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


class Poison(TrainerCallback):
    """Makes the weights infinite before a step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(model.parameters()).data.fill_(float("nan"))


def test_a_loss_that_is_not_finite_ends_the_run_with_its_batch_saved(make_trainer, tmp_path):
    trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.add_callback(Poison())
    with pytest.raises(NonFiniteLossError, match=r"loss of step 2 is not finite \(nan, nan\)"):
        trainer.train()
    path = tmp_path / "out" / "nan_batch.pt"
    saved = torch.load(path)
    assert saved["step"] == 2 and len(saved["batches"]) == 2
    assert saved["batches"][0]["input_ids"].shape[0] == 2
    assert trainer.state.global_step == 1
    assert "forward" not in trainer.model.__dict__


def test_another_tokenizer_is_refused(make_trainer, trajectories):
    from tests.cli.conftest import TEMPLATE  # a tokenizer differs by vocabulary, not by template

    same = letters_tokenizer()
    other = type(same)(tokenizer_object=same.backend_tokenizer, pad_token="<pad>")
    other.chat_template = TEMPLATE
    load_trajectories(trajectories, tokenizer=other)
    other.add_tokens(["<new>"])
    with pytest.raises(StoreError, match="tokenizer is not the one"):
        load_trajectories(trajectories, tokenizer=other)
    dataset = load_trajectories(trajectories)
    from cllm.training.arguments import ConsistencyTrainingArguments
    from cllm.training.trainer import ConsistencyTrainer

    with pytest.raises(StoreError, match="tokenizer is not the one"):
        ConsistencyTrainer(
            fresh_model(),
            ConsistencyTrainingArguments(output_dir="unused", use_cpu=True),
            dataset,
            processing_class=other,
        )


def test_bad_inputs(make_trainer, tmp_path):
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        make_trainer(dataset=tmp_path)
    with pytest.raises(ValueError, match="holds no trajectories"):
        make_trainer(dataset=[])
    with pytest.raises(ValueError, match="needs held-out prompts"):
        make_trainer(eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="needs held-out prompts"):
        make_trainer().evaluate()
    with pytest.raises(ValueError, match="lora_targets 'nothing'"):
        make_trainer(lora_r=2, lora_targets="nothing")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path))


def test_replacing_a_folder_survives_an_interruption_anywhere(tmp_path):
    target = tmp_path / "best"
    with replaced_folder(target) as folder:
        (folder / "content").write_text("first")
    with pytest.raises(RuntimeError), replaced_folder(target) as folder:
        (folder / "content").write_text("half")
        raise RuntimeError
    assert (target / "content").read_text() == "first"
    # the states that a crash between two renames can leave
    shutil.copytree(target, tmp_path / "best.ready")
    (tmp_path / "best.ready" / "content").write_text("second")
    recover_folder(target)
    assert (target / "content").read_text() == "second"
    target.rename(tmp_path / "best.old")
    recover_folder(target)
    assert (target / "content").read_text() == "second"
    target.rename(tmp_path / "best.old")
    shutil.copytree(tmp_path / "best.old", tmp_path / "best.ready")
    (tmp_path / "best.ready" / "content").write_text("third")
    recover_folder(target)
    assert (target / "content").read_text() == "third"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best.part"]
