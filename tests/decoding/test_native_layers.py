"""Whole decoder layers in one native call: which models have them; nothing else changes."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers as hf

import cllm
import cllm_kernels
from cllm.adapter import LowRank
from cllm.decoding import layers, layouts
from cllm.decoding.forward import BlockForward
from cllm.decoding.layouts import choose_layout
from cllm.decoding.support import check_model
from cllm_kernels.decoder_layer import OP

from .test_gated import greedy, random_adapter
from .tiny_models import CONFIGS, prompts, tiny_model

NATIVE = layouts.Layout(False, "native")
FAMILIES = ["llama", "mistral", "qwen2", "qwen2-local", "qwen3"]
needs_native = pytest.mark.skipif(
    OP.unavailable("cpp", torch.device("cpu")) is not None, reason="no C++ kernels"
)
pytestmark = needs_native


@torch.no_grad()
def layout_of(model, rows=8, gated=False):
    ids = prompts([9])["input_ids"][0]
    return choose_layout(model, check_model(model), ids, rows, gated=gated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_who_has_them(family, dtype):
    for gated in (False, True):
        assert layout_of(tiny_model(family, dtype), gated=gated) == NATIVE


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(FAMILIES)))
def test_who_has_not(family):
    assert layers.decoder_layers(tiny_model(family), check_model(tiny_model(family)), 8) is None


def test_many_rows_and_other_backends_take_another_way():
    model = tiny_model("llama")
    assert layout_of(model, rows=64) == NATIVE
    assert layout_of(model, rows=65) != NATIVE
    with cllm_kernels.use_backend("reference"):
        assert layout_of(model) != NATIVE
    assert layout_of(model) == NATIVE
    with torch.autocast("cpu", torch.bfloat16):
        assert layers.decoder_layers(model, check_model(model), 8) is None


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def replaced_forward(model):
    model.model.layers[0].self_attn.forward = model.model.layers[0].self_attn.forward


def other_norm(model):
    model.model.layers[1].input_layernorm = torch.nn.RMSNorm(32)


def other_linear(model):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Scaled(old.in_features, old.out_features, bias=False)


def other_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


class Subclass(hf.LlamaForCausalLM):
    pass


def subclassed(model):
    model.__class__ = Subclass


@pytest.mark.parametrize(
    "change",
    [hooked, replaced_forward, other_norm, other_linear, other_activation, subclassed],
    ids=lambda change: change.__name__,
)
def test_whoever_changed_a_layer_is_heard(change):
    """And the model decodes as it does by itself."""
    model = copy.deepcopy(tiny_model("llama"))
    assert layers.decoder_layers(model, check_model(model), 8)
    change(model)
    assert not layers.decoder_layers(model, check_model(model), 8)
    inputs = prompts([9, 4])
    found = cllm.generate(model, **inputs, max_new_tokens=16, block_size=6)
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=16))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_other_layouts(family, monkeypatch):
    """Verify rows and guess rows, behind more context than a sliding window holds."""
    model, adapter = tiny_model(family), random_adapter(family, 0.01)
    traits = check_model(model)
    ids = prompts([90, 80], seed=3)["input_ids"]
    lengths = torch.tensor([70, 80])
    tokens = ids[:, -7:].contiguous()
    found = {}
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(layouts, "native_devices", devices)
        layout = layout_of(model, 24, gated=True)
        assert (layout == NATIVE) == bool(devices)
        block = BlockForward(
            model, traits, batch=2, slots=120, device=ids.device, position_limit=None, layout=layout
        )
        with torch.no_grad(), layout.applied(model), adapter.applied(model) as gate:
            block.prefill(ids[:, :80], lengths)
            with gate.open(5, 2, 12):
                found[bool(devices)] = block.gated_window(tokens, 5, lengths, lengths.tolist())
    torch.testing.assert_close(found[True], found[False], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_size_gives_the_same_bits(family, dtype):
    """In 16 bits, too: no sum of a row depends on how many rows there are."""
    model, inputs = tiny_model(family, dtype), prompts([23, 1, 12])
    one = cllm.generate(model, **inputs, max_new_tokens=60, block_size=1)
    adapter = random_adapter(family, 0.05)
    for changes in (
        {"block_size": 5},
        {"block_size": 16, "mode": "block"},
        {"block_size": 9, "adapter": adapter, "verify_size": 4},
    ):
        found = cllm.generate(model, **inputs, max_new_tokens=60, **changes)
        assert torch.equal(found, one), changes


def test_a_cache_that_grows():
    """Past the 512 slots that it starts with, and from a prompt of a single token."""
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 1024
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    assert layout_of(model) == NATIVE
    for length, new in ((500, 60), (1, 8)):
        inputs = prompts([length])
        found = cllm.generate(model, **inputs, max_new_tokens=new, block_size=7, eos_token_id=None)
        expected = greedy(model, inputs, max_new_tokens=new, eos_token_id=None)
        assert torch.equal(found, expected)


def test_weights_that_moved_between_calls_are_the_new_ones():
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9])
    cllm.generate(model, **inputs, max_new_tokens=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.flip(0).contiguous()
    found = cllm.generate(model, **inputs, max_new_tokens=16)
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=16))


def test_layers_get_their_own_forward_back_from_concurrent_calls():
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9])
    expected = greedy(model, inputs, max_new_tokens=40)
    found = []

    def decode(adapter):
        for _ in range(3):
            found.append(cllm.generate(model, **inputs, max_new_tokens=40, adapter=adapter))

    adapters = [None, random_adapter("llama", 0.05), random_adapter("llama", 0.1)]
    threads = [threading.Thread(target=decode, args=(adapter,)) for adapter in adapters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9 and all(torch.equal(one, expected) for one in found)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_layer_that_falls_back_is_an_error():
    """Its own forward would read a mask that masks nothing."""
    model = copy.deepcopy(tiny_model("llama"))
    traits, ids = check_model(model), prompts([9])["input_ids"]
    with torch.no_grad(), NATIVE.applied(model):
        block = BlockForward(
            model, traits, batch=1, slots=20, device=ids.device, position_limit=None, layout=NATIVE
        )
        block.prefill(ids[:, :6], torch.tensor([6]))
        model.model.layers[1].forward = type(model.model.layers[1]).forward.__get__(
            model.model.layers[1]
        )
        with pytest.raises(RuntimeError, match="own forward ran over a window of native layers"):
            block.window(ids[:, 6:], torch.tensor([6]), [6])


def counted(monkeypatch):
    """Calls of the op for one layer and of that for all, from now on."""
    calls = {"decoder_layer": 0, "decoder_layers": 0}
    for name in calls:
        own = getattr(cllm_kernels, name)

        def count(*args, name=name, own=own, **kwargs):
            calls[name] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(cllm_kernels, name, count)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_is_one_call(family, monkeypatch):
    """With an adapter, too."""
    model, inputs = tiny_model(family), prompts([23, 1, 12])
    expected = greedy(model, inputs, max_new_tokens=40)
    layout_of(model, 64), layout_of(model, 64, gated=True)  # not to be counted
    for changes in ({}, {"adapter": random_adapter(family, 0.05)}):
        calls = counted(monkeypatch)
        settings = {"max_new_tokens": 40, "block_size": 6, "return_dict_in_generate": True}
        out = cllm.generate(model, **inputs, **settings, **changes)
        monkeypatch.undo()
        assert torch.equal(out.sequences, expected)
        assert calls == {"decoder_layer": 0, "decoder_layers": out.forwards + 1}  # the prompts


def stopped_early(model):
    model.config.num_hidden_layers = 1


def walked_otherwise(model):
    own = model.model.forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 0.5
        return output

    model.model.forward = forward


def another_size(model):
    mlp, width = model.model.layers[1].mlp, model.config.intermediate_size // 2
    for name in ("gate_proj", "up_proj"):
        linear = getattr(mlp, name)
        linear.weight = torch.nn.Parameter(linear.weight.detach()[:width].clone())
        linear.out_features = width
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach()[:, :width].clone())
    mlp.down_proj.in_features = width


@pytest.mark.parametrize(
    "change", [stopped_early, walked_otherwise, another_size], ids=lambda change: change.__name__
)
def test_models_that_are_no_walk_through_equal_layers(change, monkeypatch):
    """Their layers run as `decoder_layer`, one by one, where the model comes to them."""
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    change(model)
    expected = greedy(model, inputs, max_new_tokens=16)
    assert layout_of(model) == NATIVE
    calls = counted(monkeypatch)
    found = cllm.generate(model, **inputs, max_new_tokens=16, block_size=6)
    assert torch.equal(found, expected)
    assert calls["decoder_layers"] == 0 and calls["decoder_layer"] > 0


def test_models_that_share_a_layer():
    """Each runs its own layers, whichever was there first."""
    whole = copy.deepcopy(tiny_model("llama"))
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = 1
    part = hf.AutoModelForCausalLM.from_config(config).eval()
    part.model.embed_tokens, part.lm_head = whole.model.embed_tokens, whole.lm_head
    part.model.norm, part.model.layers[0] = whole.model.norm, whole.model.layers[0]
    inputs = prompts([9, 4])
    expected = {model: greedy(model, inputs, max_new_tokens=16) for model in (whole, part)}
    assert not torch.equal(expected[whole], expected[part])
    for model in (whole, part):
        layout_of(model)
    for outer in (whole, part):
        with NATIVE.applied(outer):
            for model in (whole, part, whole):
                found = cllm.generate(model, **inputs, max_new_tokens=16, block_size=6)
                assert torch.equal(found, expected[model])
    assert all("forward" not in module.__dict__ for module in whole.modules())


def test_what_happens_between_layers_is_not_passed_over():
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9])
    layout_of(model)

    def copied(module, _, output):
        return output.clone() if type(module).__name__ == "LlamaDecoderLayer" else None

    hook = torch.nn.modules.module.register_module_forward_hook(copied)
    try:
        with pytest.raises(RuntimeError, match="layer 1 was not given what the layers before it"):
            cllm.generate(model, **inputs, max_new_tokens=8)
    finally:
        hook.remove()


@torch.no_grad()
def test_a_cache_that_sees_new_weights_and_goes_with_its_call():
    model = copy.deepcopy(tiny_model("llama"))
    traits, ids = check_model(model), prompts([12], seed=2)["input_ids"]
    lengths = torch.tensor([6])

    def filled():
        block = BlockForward(
            model, traits, batch=1, slots=30, device=ids.device, position_limit=None, layout=NATIVE
        )
        block.prefill(ids[:, :6], lengths)
        return block

    def window(block):
        with NATIVE.applied(model):
            return block.window(ids[:, 6:9], lengths, [6])

    block = filled()
    before = window(block)
    # behind the last keys and values, so that what is cached stays right
    for parameter in model.model.layers[-1].mlp.parameters():
        parameter.data = parameter.data.flip(0).contiguous()
    after = window(block)
    assert torch.equal(after, window(filled())) and not torch.equal(after, before)
    gc.collect()
    gc.disable()  # memory of a cache must not wait for it
    try:
        cache = weakref.ref(block.cache)
        del block
        assert cache() is None
    finally:
        gc.enable()


def test_an_adapter_that_comes_and_goes_between_forwards():
    model, adapter = tiny_model("llama"), random_adapter("llama", 0.05)
    traits, ids = check_model(model), prompts([12], seed=2)["input_ids"]
    lengths = torch.tensor([6])
    with torch.no_grad(), NATIVE.applied(model):
        block = BlockForward(
            model, traits, batch=1, slots=30, device=ids.device, position_limit=None, layout=NATIVE
        )
        block.prefill(ids[:, :6], lengths)

        def window():
            return block.gated_window(ids[:, 6:9], 3, lengths, [6])

        plain = window()
        with adapter.applied(model) as gate:
            assert torch.equal(window(), plain)  # the gate is closed
            with gate.open(3, 1, 6):
                gated = window()
            assert torch.equal(window(), plain)
            with gate.open(3, 1, 5), pytest.raises(RuntimeError, match=r"over \[1, 5\] tokens"):
                window()
        assert torch.equal(window(), plain)
        other = random_adapter("llama", 0.1)
        with adapter.applied(model) as one, other.applied(model) as two:
            with two.open(3, 1, 6):
                assert not torch.equal(window()[:, 3:], gated[:, 3:])
            with one.open(3, 1, 6):
                assert torch.equal(window(), gated)
            several = pytest.raises(RuntimeError, match="several adapters are on")
            with one.open(3, 1, 6), two.open(3, 1, 6), several:
                window()
    assert torch.equal(gated[:, :3], plain[:, :3]) and not torch.equal(gated, plain)


def test_an_adapter_of_strided_matrices():
    model, inputs = tiny_model("llama"), prompts([9])
    adapter = random_adapter("llama", 0.05)
    strided = cllm.GatedAdapter(
        {
            name: LowRank(pair.a.t().contiguous().t(), pair.b.t().contiguous().t(), pair.scaling)
            for name, pair in adapter.weights.items()
        },
        adapter.metadata,
    )
    found = cllm.generate(model, **inputs, max_new_tokens=12, block_size=5, adapter=strided)
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=12))
