"""A patched model is a module like any other: PEFT, checkpointing, compilers and loops work on it,
other calls are untouched, and the patch comes off without a trace."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing

import cllm
from cllm import ConsistencyConfig, UnsupportedModelError
from cllm.training.packing import ConsistencyCollator
from tests.decoding.tiny_models import fresh_model, prompts
from tests.training.definition import defined_loss, every_state, random_example
from tests.training.exact import exact_model

peft = pytest.importorskip("peft")

CONFIG = ConsistencyConfig(ar_weight=0.7)
SAMPLES = [every_state(random_example(1)), every_state(random_example(2, prompt=3, response=9))]
BATCH = ConsistencyCollator(CONFIG, column_multiple=8, row_multiple=4)(SAMPLES)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, batch=BATCH):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def lora(model, **settings):
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4} | settings
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a fresh adapter does nothing
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return wrapped


# ---- the patch itself ----


def test_undo_restores_the_forward_exactly():
    model = fresh_model()
    before, signature = dict(model.__dict__), inspect.signature(model.forward)
    handle = cllm.patch_training(model, CONFIG)
    assert handle.active and handle.model is model
    assert inspect.signature(model.forward) == signature
    assert "loss" in model(**BATCH)
    handle.remove()
    handle.remove()
    assert not handle.active
    assert model.__dict__.keys() == before.keys()
    assert model.forward.__func__ is type(model).forward
    assert "consistency_loss" not in model(**BATCH)  # transformers ignores what it does not know


def test_undo_brings_back_a_forward_of_the_instance():
    model = fresh_model()
    calls = []
    own = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    mine = model.forward
    handle = cllm.patch_training(model, CONFIG)
    calls.clear()
    model(input_ids=torch.tensor([[3, 4]]))
    assert calls == [1]
    handle.remove()
    assert model.forward is mine


def test_a_forward_wrapped_by_others_passes_on_after_undo():
    model = fresh_model()
    handle = cllm.patch_training(model, CONFIG)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # as accelerate does
    assert "consistency_loss" in model(**BATCH)
    handle.remove()
    assert not handle.active
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, fresh_model()(ids).logits)
    assert "consistency_loss" not in model(**BATCH)  # transformers ignores what it does not know


def test_patching_again_replaces_the_settings():
    model = fresh_model()
    first = cllm.patch_training(model, CONFIG)
    second = cllm.patch_training(model, replace(CONFIG, ar_weight=0.0))
    assert not first.active and second.active
    first.remove()
    output = model(**BATCH)
    assert torch.equal(output.loss, output.consistency_loss)
    second.remove()
    assert "forward" not in model.__dict__


def test_other_calls_are_untouched():
    model, plain = fresh_model(), fresh_model()
    cllm.patch_training(model, CONFIG)
    inputs = prompts([5, 9])
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    labels = inputs["input_ids"]
    assert torch.equal(model(**inputs, labels=labels).loss, plain(**inputs, labels=labels).loss)
    texts = [m.generate(**inputs, max_new_tokens=12, do_sample=False) for m in (model, plain)]
    assert torch.equal(*texts)
    assert torch.equal(cllm.generate(model, **inputs, max_new_tokens=12), texts[0])


def test_a_deep_copy_is_patched_for_itself():
    model = fresh_model()
    cllm.patch_training(model, CONFIG)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**BATCH).loss, model(**BATCH).loss)
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    assert twin(**BATCH).loss != model(**BATCH).loss


def test_saves_what_an_unpatched_model_saves(tmp_path):
    model = fresh_model()
    names = set(model.state_dict())
    cllm.patch_training(model, replace(CONFIG, teacher="base"))
    assert set(model.state_dict()) == names
    assert not any("teacher" in name for name, _ in model.named_modules())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_takes_input_ids_by_place_and_gives_a_tuple_if_asked():
    model = fresh_model()
    cllm.patch_training(model, CONFIG)
    rest = {name: value for name, value in BATCH.items() if name != "input_ids"}
    loss = model(**BATCH).loss
    assert torch.equal(model(BATCH["input_ids"], **rest).loss, loss)
    assert torch.equal(model(**BATCH, return_dict=False)[0], loss)


# ---- what is built around a module ----


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(reentrant):
    model = exact_model().train()
    cllm.patch_training(model, CONFIG)
    loss, expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, found = loss_and_gradients(model)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["whole", "in place", "decoder", "decoder before"])
def test_compiled_models_give_the_same(how):
    model = exact_model().train()
    handle = cllm.patch_training(model, CONFIG)
    loss, expected = loss_and_gradients(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = model
    if how == "decoder before":
        handle.remove()
        model.model = torch.compile(model.model, backend=counter)
        handle = cllm.patch_training(model, CONFIG)
        expected = {n.replace("model.", "model._orig_mod.", 1): g for n, g in expected.items()}
    if how == "whole":
        compiled = torch.compile(model, backend=counter)
    elif how == "in place":
        model.compile(backend=counter)
    elif how == "decoder":
        model.model.compile(backend=counter)
    model.zero_grad()
    again = compiled(**BATCH).loss
    again.backward()
    assert counter.op_count > 50  # the decoder was compiled, not passed by
    torch.testing.assert_close(again.detach(), loss, rtol=1e-12, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    frames = counter.frame_count
    compiled(**ConsistencyCollator(CONFIG, column_multiple=8, row_multiple=4)(SAMPLES[::-1]))
    assert counter.frame_count == frames  # same shapes: nothing is compiled again
    handle.remove()


def test_autocast_runs_the_head_in_16_bits():
    model = fresh_model().train()
    cllm.patch_training(model, CONFIG)
    full, _ = loss_and_gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**BATCH)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, full, rtol=0.02, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_an_optimiser_lowers_the_loss():
    model = fresh_model().train()
    cllm.patch_training(model, CONFIG)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        output = model(**BATCH)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


# ---- LoRA ----


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("consistency", ["global", "local"])
def test_lora_with_its_base_as_the_teacher(patch_first, consistency, exact_softmax):
    config = replace(CONFIG, teacher="base", consistency=consistency)
    batch = ConsistencyCollator(config)(SAMPLES)
    base, model = exact_model(), exact_model()
    handle = cllm.patch_training(model, config) if patch_first else None
    wrapped = lora(model, lora_dropout=0.0)
    handle = handle or cllm.patch_training(wrapped, config)
    assert handle.model is model
    loss, found = loss_and_gradients(wrapped, batch)
    assert handle._copy is None  # no second model in memory
    assert found and all("lora" in name for name in found)
    assert [p.requires_grad for n, p in wrapped.named_parameters() if "lora" in n] == [True] * 18
    handle.remove()
    wrapped.zero_grad()
    expected = defined_loss(wrapped, SAMPLES, config, base)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=0)
    for name, gradient in gradients(wrapped).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_head_trained_beside_the_adapter_teaches_as_it_was(exact_softmax):
    config = replace(CONFIG, teacher="base")
    base, wrapped = exact_model(), lora(exact_model(), modules_to_save=["lm_head"])
    handle = cllm.patch_training(wrapped, config)
    head = wrapped.get_base_model().lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.mul_(1.3)
    loss, found = loss_and_gradients(wrapped)
    assert handle._copy is None
    handle.remove()
    wrapped.zero_grad()
    expected = defined_loss(wrapped, SAMPLES, config, base)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=0)
    assert found.keys() == gradients(wrapped).keys()
    torch.testing.assert_close(
        found["base_model.model.lm_head.modules_to_save.default.weight"], head.grad
    )


def test_the_base_teacher_has_no_dropout_and_the_student_keeps_its_own():
    config = replace(CONFIG, teacher="base", ar_weight=0.0)
    wrapped = lora(exact_model(), lora_dropout=0.5).train()
    handle = cllm.patch_training(wrapped, config)
    seen = []
    hook = wrapped.get_base_model().model.register_forward_hook(
        lambda module, args, output: seen.append((module.training, output.last_hidden_state))
    )
    wrapped(**BATCH), wrapped(**BATCH)
    hook.remove()
    assert [training for training, _ in seen] == [True, False, True, False]
    assert not torch.equal(seen[0][1], seen[2][1])
    assert torch.equal(seen[1][1], seen[3][1])
    assert wrapped.training
    handle.remove()


def test_the_adapter_is_on_again_after_an_error():
    wrapped = lora(fresh_model())
    handle = cllm.patch_training(wrapped, replace(CONFIG, teacher="base"))
    ids = torch.tensor([[3, 4, 5]])
    before = wrapped(ids).logits

    def fails(module, args, kwargs):
        if not module.training:
            raise RuntimeError("out of luck")

    wrapped.train()
    hook = wrapped.get_base_model().model.register_forward_pre_hook(fails, with_kwargs=True)
    with pytest.raises(RuntimeError, match="out of luck"):
        wrapped(**BATCH)
    hook.remove()
    assert wrapped.training
    assert torch.equal(wrapped(ids).logits, before)
    handle.remove()


def test_weights_trained_beside_an_adapter_make_the_base_a_copy():
    wrapped = lora(exact_model(), bias="none")
    wrapped.get_base_model().lm_head.weight.requires_grad_(True)
    handle = cllm.patch_training(wrapped, replace(CONFIG, teacher="base"))
    loss = wrapped(**BATCH).loss.detach()
    with torch.no_grad():
        wrapped.get_base_model().lm_head.weight.mul_(1.3)
    teacher = handle.teacher().model
    assert not torch.equal(teacher.lm_head.weight, wrapped.get_base_model().lm_head.weight)
    own = wrapped.get_base_model().model.layers[0].mlp.up_proj.weight
    assert teacher.model.layers[0].mlp.up_proj.weight is own  # frozen, so shared
    assert wrapped(**BATCH).loss != loss


def test_an_ema_of_an_adapter_shares_the_frozen_weights():
    config = replace(CONFIG, teacher="ema", ema_decay=0.5)
    model = exact_model()
    handle = cllm.patch_training(model, config)
    wrapped = lora(model)
    loss = wrapped(**BATCH).loss
    self_taught = cllm.patch_training(wrapped, CONFIG)
    torch.testing.assert_close(wrapped(**BATCH).loss, loss)  # the average starts at the weights
    self_taught.remove()
    handle = cllm.patch_training(wrapped, config)
    teacher = handle.teacher().model
    shared = [
        name
        for name, parameter in model.named_parameters()
        if dict(teacher.named_parameters())[name] is parameter
    ]
    assert len(shared) == sum(not p.requires_grad for p in model.parameters())


# ---- bad input ----


def broken(**changes):
    return {name: value for name, value in {**BATCH, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visible": None}, "a packed batch needs visible; batches are made by Consistency"),
        ({"clean_labels": None}, "a packed batch needs clean_labels"),
        ({"input_ids": BATCH["input_ids"].int()}, "input_ids must be int64, not torch.int32"),
        ({"row_weights": BATCH["row_weights"].long()}, "row_weights must be floating-point"),
        ({"sample_ids": BATCH["sample_ids"][0]}, "sample_ids must be a tensor of two dimensions"),
        ({"position_ids": BATCH["position_ids"][:, 1:]}, "does not fit input_ids"),
        ({"student_index": BATCH["student_index"] + 100}, r"student_index points to column \d+ of"),
        ({"clean_index": BATCH["clean_index"] - 99}, "clean_index points to column -"),
        ({"labels": BATCH["input_ids"]}, "a packed batch has no field 'labels'"),
        ({"totals": 3.0}, "totals must be two numbers"),
        ({"totals": (1.0, float("nan"))}, "totals must be two numbers"),
        ({"totals": (1.0, 1.0)}, "totals counts 1 rows, but this batch alone has"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_batches_are_refused_in_one_line(changes, message):
    model = fresh_model()
    cllm.patch_training(model, CONFIG)
    with pytest.raises(ValueError, match=message) as error:
        model(**broken(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["bloom", "falcon-alibi", "gpt-neo"])
def test_models_that_do_not_keep_to_masks_and_positions_are_refused(family):
    with pytest.raises(UnsupportedModelError, match="position"):
        cllm.patch_training(fresh_model(family), CONFIG)


def test_what_16_bits_round_is_not_taken_for_a_wrong_mask():
    model = fresh_model().to(torch.bfloat16)
    # as a trained adapter does in a deep model: small differences become large
    model.model.norm.register_forward_hook(lambda module, args, output: torch.sin(20 * output))
    cllm.patch_training(model, CONFIG).remove()
    # what hangs on the column is still found
    model.model.norm.register_forward_hook(
        lambda module, args, output: output * torch.arange(output.shape[1])[:, None].cos()
    )
    with pytest.raises(UnsupportedModelError, match="on a packed row"):
        cllm.patch_training(model, CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_looks_ahead_is_refused_in_every_precision(dtype):
    model = fresh_model().to(dtype)
    model.model.norm.register_forward_hook(lambda module, args, output: output + output.roll(-1, 1))
    with pytest.raises(UnsupportedModelError, match="on a packed row"):
        cllm.patch_training(model, CONFIG)


def test_other_models_are_refused():
    model = fresh_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="set_attn_implementation"):
        cllm.patch_training(model, CONFIG)
    prompted = peft.get_peft_model(
        fresh_model(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        cllm.patch_training(prompted, CONFIG)
