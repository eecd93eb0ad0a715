"""Gated training is what its definition says, and the base model is left as it is."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm
from cllm import ConsistencyConfig, UnsupportedModelError
from cllm.training.forwards import clean_columns
from cllm.training.masks import PackedTokens, attention_masks
from cllm.training.packed_sample import pack_sample
from cllm.training.packing import TOKEN_FIELDS, ConsistencyCollator
from cllm.training.sampling import SampledDataset
from tests.decoding.tiny_models import fresh_model, prompts
from tests.training.definition import every_state, first_states, random_example
from tests.training.exact import FAMILIES, exact_model
from tests.training.gated_definition import adapted, defined_gated_loss

peft = pytest.importorskip("peft")

CONFIG = ConsistencyConfig(gated=True)
SAMPLES = [
    every_state(random_example(1)),
    first_states(random_example(2, prompt=3, response=9)),
    # its first segment starts at the first token of the text
    every_state(random_example(3, prompt=1, response=6, block_size=8)),
]
IDS = torch.tensor([[3, 4, 5, 9, 8]])


def batch_of(samples, config=CONFIG, **changes):
    shape = {"column_multiple": 8, "row_multiple": 4, "samples_per_row": 2} | changes
    return ConsistencyCollator(config, **shape)(samples)


BATCH = batch_of(SAMPLES)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- the definition ----


@pytest.mark.parametrize("two_parts", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_definitions(family, two_parts, exact_softmax):
    wrapped = adapted(exact_model(family), family)
    expected, rows = defined_gated_loss(wrapped, SAMPLES, CONFIG)
    expected_gradients = gradients(wrapped, expected)
    gate = cllm.patch_training(wrapped, CONFIG)._gate
    assert gate.two_parts
    gate.two_parts = two_parts
    output = wrapped(**BATCH)
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=1e-12)
    assert int(output.tokens) == rows > 20
    assert_same_gradients(gradients(wrapped, output.loss), expected_gradients)
    assert all("lora" in name for name in expected_gradients)


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.3},
        {"temperature": 2.5},
        {"recompute": True},
        {"chunk_tokens": 4},
        {"teacher": "base"},
        {"ar_weight": 0.0},
    ],
    ids=str,
)
def test_every_setting_of_the_loss(changes, exact_softmax):
    config = replace(CONFIG, **changes)
    wrapped = adapted(exact_model())
    expected, _ = defined_gated_loss(wrapped, SAMPLES, config)
    expected_gradients = gradients(wrapped, expected)
    handle = cllm.patch_training(wrapped, config)
    output = wrapped(**BATCH)
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=1e-12)
    assert_same_gradients(gradients(wrapped, output.loss), expected_gradients)
    assert handle.teacher() is None and handle.teacher_state_dict() == {}
    # reported, not trained
    assert torch.equal(output.loss, output.consistency_loss) and output.ar_loss > 1


def test_two_halves_of_a_batch_add_up_to_it(exact_softmax):
    wrapped = adapted(exact_model())
    cllm.patch_training(wrapped, CONFIG)
    whole = wrapped(**BATCH)
    expected = gradients(wrapped, whole.loss)
    rows = float(BATCH["row_weights"].sum())
    labels = float((BATCH["teacher_labels"] >= 0).sum() + (BATCH["clean_labels"] >= 0).sum())
    parts = [batch_of([sample]) | {"totals": (rows, labels)} for sample in SAMPLES]
    outputs = [wrapped(**part) for part in parts]
    torch.testing.assert_close(sum(output.loss for output in outputs), whole.loss)
    torch.testing.assert_close(sum(output.ar_loss for output in outputs), whole.ar_loss)
    # forwards first, one backward behind them all
    assert_same_gradients(gradients(wrapped, sum(output.loss for output in outputs)), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2-local", "gpt2"])
def test_windows_that_go_on_behind_their_block(family, exact_softmax):
    config = replace(CONFIG, sampling="sliding", states=2)
    examples = [random_example(1, response=15), random_example(4, 1, 11, block_size=5)]
    samples = [SampledDataset(examples, config, seed=3)[index] for index in range(2)]
    tails = [tail for sample in samples for tail in sample.tails.values()]
    assert None in tails and sum(tail is not None for tail in tails) > 4
    wrapped = adapted(exact_model(family), family)
    expected, rows = defined_gated_loss(wrapped, samples, config)
    expected_gradients = gradients(wrapped, expected)
    cllm.patch_training(wrapped, config)
    output = wrapped(**batch_of(samples, config))
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=1e-12)
    assert int(output.tokens) == rows > 20
    assert_same_gradients(gradients(wrapped, output.loss), expected_gradients)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), prompt=st.integers(1, 5), response=st.integers(1, 12))
def test_segments_start_at_the_last_right_token(seed, prompt, response):
    sample = every_state(random_example(seed, prompt=prompt, response=response))
    plain, gated = pack_sample(sample), pack_sample(sample, gated=True)
    assert gated.rows == plain.rows and gated.labels == plain.labels
    assert gated.clean == plain.clean and gated.nominal == plain.nominal
    for (first, tokens), (lead_first, lead_tokens) in zip(
        plain.segments, gated.segments, strict=True
    ):
        assert lead_first == first - 1 >= 0
        assert lead_tokens == [gated.clean[first - 1], *tokens]


# ---- the base model ----


def clean_hidden(model, batch):
    """Hidden states of the clean columns, and of the noisy ones, of a plain packed forward."""
    names = ("sample_ids", "segment_ids", "position_ids", "visible")
    tokens = PackedTokens(**{name: batch[name] for name in names})
    hidden = model.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=attention_masks(tokens, {"full_attention": None}, "sdpa", model.dtype),
        use_cache=False,
    ).last_hidden_state
    clean = (batch["segment_ids"] == 0) & (batch["sample_ids"] >= 0)
    return hidden[clean], hidden[batch["segment_ids"] > 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, 1e4])
@pytest.mark.parametrize("two_parts", [True, False])
def test_clean_rows_are_the_base_models_to_the_bit(dtype, scale, two_parts):
    base = fresh_model().to(dtype)
    wrapped = adapted(fresh_model().to(dtype), scale=scale)
    gate = cllm.patch_training(wrapped, CONFIG)._gate
    assert gate.two_parts
    gate.two_parts = two_parts
    model, seen = wrapped.get_base_model(), []
    hook = model.model.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state))
    with torch.no_grad():
        wrapped(**BATCH)
        clean, noisy = clean_hidden(base, BATCH)
        if two_parts:  # the clean columns go alone
            fields = TOKEN_FIELDS
            first = clean_columns(BATCH)
            clean, _ = clean_hidden(base, {name: BATCH[name][:, :first] for name in fields})
    hook.remove()
    assert len(seen) == 1 + two_parts
    found = torch.cat(seen, dim=1)
    assert torch.equal(found[(BATCH["segment_ids"] == 0) & (BATCH["sample_ids"] >= 0)], clean)
    assert not torch.equal(found[BATCH["segment_ids"] > 0], noisy)


def test_other_forwards_are_the_base_models():
    base, wrapped = fresh_model(), adapted(fresh_model())
    free = wrapped(IDS).logits
    handle = cllm.patch_training(wrapped, CONFIG)
    for check in (1, 2):  # before and after a step, whose gate must not stay open
        assert torch.equal(wrapped(IDS).logits, base(IDS).logits), check
        assert torch.equal(
            wrapped.get_base_model().model(IDS).last_hidden_state,
            base.model(IDS).last_hidden_state,
        )
        wrapped(**BATCH).loss.backward()
    inputs = prompts([5, 9])
    expected = base.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(wrapped.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
    handle.remove()
    assert torch.equal(wrapped(IDS).logits, free) and not torch.equal(free, base(IDS).logits)
    assert not any(module._forward_hooks for module in wrapped.modules())


def test_training_leaves_the_base_weights_bits():
    model = fresh_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    wrapped = adapted(model).train()
    cllm.patch_training(wrapped, CONFIG)
    optimiser = torch.optim.AdamW(
        [p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    losses = []
    for _ in range(30):
        output = wrapped(**BATCH)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        losses.append((float(output.loss.detach()), float(output.ar_loss)))
    assert losses[-1][0] < 0.7 * losses[0][0]
    # nor does the base model's own loss move
    assert len({ar for _, ar in losses}) == 1
    after = {
        name.replace(".base_layer", ""): value
        for name, value in model.named_parameters()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ---- what is built around a module ----


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_finds_the_gate_of_its_forward(reentrant, exact_softmax):
    wrapped = adapted(exact_model()).train()
    cllm.patch_training(wrapped, CONFIG)
    other = batch_of([SAMPLES[2]])
    expected = gradients(wrapped, wrapped(**BATCH).loss + wrapped(**other).loss)
    wrapped.enable_input_require_grads()
    wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    hook = (
        wrapped.get_base_model()
        .model.layers[0]
        .self_attn.register_forward_hook(lambda *args: runs.append(1))
    )
    # another forward in between, of another shape, and none of a gate
    first, second = wrapped(**BATCH).loss, wrapped(**other).loss
    wrapped(IDS)
    found = gradients(wrapped, first + second)
    hook.remove()
    assert len(runs) == 5  # each packed forward again in the backward pass
    assert_same_gradients(found, expected)


def test_the_base_has_no_dropout_and_the_adapter_keeps_its_own(exact_softmax):
    model = exact_model("gpt2")
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    wrapped = adapted(model, "gpt2").eval()
    expected, _ = defined_gated_loss(wrapped, SAMPLES, CONFIG)
    cllm.patch_training(wrapped.train(), CONFIG)
    flags = {name: module.training for name, module in wrapped.named_modules()}
    output = wrapped(**BATCH)
    torch.testing.assert_close(output.loss, expected, rtol=1e-11, atol=1e-12)
    output.loss.backward()
    assert flags == {name: module.training for name, module in wrapped.named_modules()}
    dropping = adapted(exact_model("gpt2"), "gpt2", lora_dropout=0.5).train()
    cllm.patch_training(dropping, CONFIG)
    one, two = dropping(**BATCH), dropping(**BATCH)
    assert one.loss != two.loss and torch.equal(one.ar_loss, two.ar_loss)


def test_a_deep_copy_has_a_gate_of_its_own():
    wrapped = adapted(fresh_model())
    handle = cllm.patch_training(wrapped, CONFIG)
    loss, base = wrapped(**BATCH).loss, wrapped(IDS).logits
    twin = copy.deepcopy(wrapped)
    handle.remove()
    assert torch.equal(twin(**BATCH).loss, loss)
    assert torch.equal(twin(IDS).logits, base)


def test_patching_again_replaces_the_gate():
    wrapped = adapted(fresh_model())
    cllm.patch_training(wrapped, CONFIG)
    loss = wrapped(**BATCH).loss
    handle = cllm.patch_training(wrapped, replace(CONFIG, temperature=2.0))
    assert wrapped(**BATCH).loss != loss
    handle = cllm.patch_training(wrapped, ConsistencyConfig())
    assert not any("lora_B" in n and m._forward_hooks for n, m in wrapped.named_modules())
    handle.remove()


def test_autocast_keeps_the_clean_rows():
    wrapped = adapted(fresh_model()).train()
    cllm.patch_training(wrapped, CONFIG)
    full = wrapped(**BATCH).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = wrapped(**BATCH)
    output.loss.backward()
    torch.testing.assert_close(output.loss, full, rtol=0.05, atol=0)


# ---- bad input ----


def test_settings_that_contradict_the_gate():
    with pytest.raises(ValueError, match="teacher must be 'self' or 'base', not 'ema'"):
        ConsistencyConfig(gated=True, teacher="ema")
    with pytest.raises(ValueError, match="consistency must be 'global', not 'local'"):
        ConsistencyConfig(gated=True, consistency="local")
    with pytest.raises(ValueError, match="gated must be True or False, not 'yes'"):
        ConsistencyConfig(gated="yes")


def never_run(model):
    """An adapted projection that the forward goes around."""
    wrapped = adapted(model)
    layer = wrapped.get_base_model().model.layers[0].self_attn
    projection = layer.q_proj
    del layer.q_proj
    layer.aside = projection
    layer.q_proj = projection.base_layer
    return wrapped


def merged(model):
    wrapped = adapted(model)
    wrapped.merge_adapter()
    return wrapped


def trained_beside(model):
    wrapped = adapted(model)
    wrapped.get_base_model().model.norm.weight.requires_grad_(True)
    return wrapped


BROKEN = {
    "no adapters": (lambda m: m, "this model has none"),
    "dora": (lambda m: adapted(m, use_dora=True), "has DoRA or another variant"),
    "merged": (merged, "is merged into the base weights"),
    "bias": (lambda m: adapted(m, lora_bias=True), "has a bias"),
    "saved": (lambda m: adapted(m, modules_to_save=["norm"]), "has another adapter"),
    "embedding": (lambda m: adapted(m, target_modules=["embed_tokens"]), "another adapter"),
    "ia3": (
        lambda m: peft.get_peft_model(
            m, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        ),
        "has another adapter",
    ),
    "trained": (trained_beside, r"model\.norm\.weight is trained beside the adapters"),
    "bias_all": (lambda m: adapted(m, "gpt2", bias="all"), "is trained beside the adapters"),
    "pissa": (lambda m: adapted(m, init_lora_weights="pissa"), "rewrites the base weights"),
    "aside": (never_run, "does not run as a layer of its own"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_adapters_that_cannot_be_gated(name):
    make, message = BROKEN[name]
    model = make(fresh_model("gpt2" if name == "bias_all" else "llama"))
    with pytest.raises(UnsupportedModelError, match=message) as error:
        cllm.patch_training(model, CONFIG)
    assert "\n" not in str(error.value)
    assert not any("lora_B" in n and m._forward_hooks for n, m in model.named_modules())


def test_adapters_that_changed_since_the_patch():
    wrapped = adapted(fresh_model())
    cllm.patch_training(wrapped, CONFIG)
    wrapped.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="adapters have changed since the patch"):
        wrapped(**BATCH)
