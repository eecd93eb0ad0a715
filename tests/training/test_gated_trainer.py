"""Runs that train a gated adapter: the base model's own text comes out, and the folders decode."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import cllm
from cllm.adapter import GatedAdapter, base_fingerprint
from cllm.training.arguments import ConsistencyTrainingArguments
from cllm.training.trainer import ConsistencyTrainer
from tests.decoding.tiny_models import fresh_model, prompts
from tests.decoding.tokenizer import letters_tokenizer

from .runs import (
    EVAL_PROMPTS,
    assert_same_parameters,
    losses,
    parameters,
    whole_and_interrupted,
)

GATED = {"gated": True, "lora_r": 4, "learning_rate": 2e-2, "stop_on_quality": False}


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_tokens" in entry]


def test_two_steps_to_folders_that_decode_as_the_base(make_trainer, tmp_path):
    model, base = fresh_model(), fresh_model()
    trainer = make_trainer(model=model, max_steps=2, prompts=EVAL_PROMPTS, **GATED)
    before = {name: value.clone() for name, value in model.named_parameters() if "lora" not in name}
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for name, value in model.named_parameters():
        assert "lora" in name or torch.equal(value, before[name])
    # the loop's own evaluation decoded with the adapter gated
    found = evaluations(trainer)[-1]
    assert found["eval_exact_match"] == 1.0 and found["eval_inside_bound"] == 1.0
    assert found["eval_nll_under_base"] == pytest.approx(found["eval_base_nll"])

    inputs = prompts([5, 9])
    expected = base.generate(**inputs, max_new_tokens=24, do_sample=False)
    for folder in (tmp_path / "adapter", trainer.best_folder):
        written = json.loads((folder / "cllm_adapter.json").read_text())
        assert written["gated"] is True and written["step"] == 2 and written["block_size"] == 8
        assert written["noisy_tokens"] == trainer.meter.total.nominal > 0
        assert written["base_fingerprint"] == base_fingerprint(base)
        assert not (folder / "model.safetensors").exists()
        adapter = GatedAdapter.load(folder)
        assert any(bool(pair.b.any()) for pair in adapter.weights.values())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it says that it was trained with the gate
            for mode in ("sliding", "block"):
                config = cllm.JacobiConfig(block_size=8, mode=mode)
                found = cllm.generate(
                    base, **inputs, adapter=folder, config=config, max_new_tokens=24
                )
                assert torch.equal(found, expected)
        other = fresh_model()
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        with pytest.raises(ValueError, match="was trained for other weights"):
            cllm.generate(other, **inputs, adapter=str(folder), max_new_tokens=4)


def test_training_makes_the_guesses_right(make_trainer):
    settings = {"max_steps": 20, "per_device_train_batch_size": 8, "states": 8, "lora_r": 8}
    trainer = make_trainer(prompts=EVAL_PROMPTS, **GATED | settings)
    trainer.train()
    assert losses(trainer)[-1][1] < 0.5 * losses(trainer)[0][1]
    # the base model's own, every epoch; the order of the rows rounds its sum
    assert losses(trainer)[-1][2] == pytest.approx(losses(trainer)[0][2], rel=1e-5)
    # speed on prompts not trained on, with the base model's own text
    found = evaluations(trainer)[-1]
    assert found["eval_exact_match"] == 1.0
    assert found["eval_tokens_per_forward"] > 1.1 * found["eval_base_tokens_per_forward"]


def test_what_the_evaluation_in_between_does_not_change(make_trainer):
    settings = {"max_steps": 3, **GATED}
    plain = make_trainer(**settings)
    plain.train()
    other = make_trainer(prompts=EVAL_PROMPTS, eval_strategy="steps", eval_steps=1, **settings)
    other.train()
    assert losses(plain) == losses(other) and len(losses(plain)) == 3
    assert all(loss == consistency for loss, consistency, _ in losses(plain))
    assert_same_parameters(parameters(plain), parameters(other), 0)


@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_checkpointing_and_accumulation_give_the_same_steps(make_trainer):
    settings = {**GATED, "optim": "sgd", "max_steps": 3, "max_grad_norm": 0.0}
    whole = make_trainer(per_device_train_batch_size=4, **settings)
    whole.train()
    parts = make_trainer(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        **settings,
    )
    parts.train()
    for one, two in zip(losses(whole), losses(parts), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_an_interrupted_run_goes_on_as_if_uninterrupted(make_trainer, tmp_path):
    settings = {
        **GATED,
        "lora_dropout": 0.1,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "prompts": EVAL_PROMPTS[:1],
        "eval_max_new_tokens": 6,
    }
    whole, second = whole_and_interrupted(make_trainer, tmp_path, 5, settings)
    assert losses(second) == losses(whole) and len(losses(whole)) == 6
    assert_same_parameters(parameters(whole), parameters(second), 0)
    assert second.meter.state() == whole.meter.state()
    assert [entry["eval_tokens_per_forward"] for entry in evaluations(second)] == [
        entry["eval_tokens_per_forward"] for entry in evaluations(whole)
    ]


def test_evaluating_a_folder(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2, **GATED)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    found = cllm.evaluate(
        fresh_model(),
        letters_tokenizer(),
        EVAL_PROMPTS,
        adapter=tmp_path / "adapter",
        config=cllm.JacobiConfig(block_size=8, verify_size=4),
        max_new_tokens=16,
    )
    assert found.exact_match == 1.0 and found.nll_under_base == pytest.approx(found.base_nll)
    # the PEFT model itself, its own adapter gated
    own = cllm.evaluate(
        trainer.model,
        letters_tokenizer(),
        EVAL_PROMPTS,
        adapter=GatedAdapter.from_peft(trainer.model, metadata={"gated": True}),
        config=cllm.JacobiConfig(block_size=8, verify_size=4),
        max_new_tokens=16,
    )
    assert own.responses == found.responses and own.forwards == found.forwards
    assert own.base_nll == found.base_nll


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 0}, "gated=True trains LoRA adapters; set lora_r"),
        ({"merge_lora": True}, "a gated adapter is never merged"),
        ({"teacher": "ema"}, "teacher must be 'self' or 'base', not 'ema'"),
        ({"consistency": "local"}, "consistency must be 'global', not 'local'"),
        ({"gated": "yes"}, "gated must be True or False, not 'yes'"),
    ],
)
def test_settings_that_contradict_the_gate(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(**GATED | settings)
    assert "\n" not in str(error.value)


def test_a_peft_model_that_cannot_be_gated(make_trainer, trajectories, tmp_path):
    from peft import LoraConfig, get_peft_model

    dora = get_peft_model(fresh_model(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    trainer = make_trainer(model=dora, **GATED)
    with pytest.raises(ValueError, match="DoRA or another variant of LoRA"):
        trainer.train()
    plain = get_peft_model(fresh_model(), LoraConfig(target_modules=["q_proj"]))
    trainer = ConsistencyTrainer(
        plain,
        ConsistencyTrainingArguments(
            output_dir=str(tmp_path / "own"), gated=True, max_steps=1, use_cpu=True
        ),
        trajectories,
        processing_class=letters_tokenizer(),
    )
    trainer.train()  # an adapter of one's own needs no lora_r
    assert trainer.state.global_step == 1


# ---- going on from an adapter ----


def test_a_run_goes_on_from_a_saved_adapter(make_trainer, tmp_path):
    first = make_trainer(**{**GATED, "output_dir": str(tmp_path / "first"), "max_steps": 6})
    first.train()
    first.save_model()
    cllm.GatedAdapter.load(tmp_path / "first").save(tmp_path / "half", dtype=torch.bfloat16)
    settings = {**GATED, "lora_r": 0, "max_steps": 1, "learning_rate": 0.0}
    for folder, tolerance in (("first", 0), ("half", 2**-8)):
        second = make_trainer(**settings, lora_from=str(tmp_path / folder))
        for name, value in parameters(first).items():
            found = second.model.get_parameter(name)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, value, rtol=tolerance, atol=0)
            assert found.requires_grad == ("lora_" in name)
    second.train()


def test_adapters_that_cannot_be_gone_on_from(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"lora_from says what the adapters are; leave lora_r out"):
        make_trainer(**{**GATED, "lora_from": str(tmp_path)})
    settings = {**GATED, "lora_r": 0, "lora_from": str(tmp_path)}
    with pytest.raises(ValueError, match=r"lora_from: .* holds no adapter of PEFT's format"):
        make_trainer(**settings)
    other = cllm.GatedAdapter.random(fresh_model("gpt2"), rank=2)
    other.save(tmp_path)
    with pytest.raises(ValueError, match=r"lora_from: the adapter in .* does not fit"):
        make_trainer(**settings)


def test_autocast_takes_the_inputs_as_they_are(make_trainer, monkeypatch):
    """From bf16 to fp32 and back is nothing but work: without it no bit changes."""
    seen, runs = [], []

    def watch(module, inputs):
        seen.append(inputs[0].dtype)

    for casts in (False, True):
        if casts:
            monkeypatch.setattr("cllm.training.trainer.lora_layers", lambda *_: [])
        model = fresh_model("llama").to(torch.bfloat16)
        trainer = make_trainer(model=model, max_steps=2, bf16=True, **GATED)
        layers = [m for m in trainer.model.modules() if hasattr(m, "cast_input_dtype_enabled")]
        hook = layers[0].lora_A["default"].register_forward_pre_hook(watch)
        trainer.train()
        hook.remove()
        runs.append(losses(trainer))
        assert all(layer.cast_input_dtype_enabled for layer in layers)
        expected = torch.float32 if casts else torch.bfloat16
        assert seen.pop() == expected
    assert runs[0] == runs[1]
