"""What stands around a call: default devices, other ranks, PEFT's modes, other loops, patches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as hf

import cllm
from cllm import GatedAdapter, linears
from cllm.decoding import checks
from cllm.head import LanguageHead

from .tiny_models import VOCAB, fresh_model, prompts, tiny_model


def greedy(model, inputs, **kwargs):
    return model.generate(**inputs, do_sample=False, **kwargs)


@pytest.mark.parametrize("window", [24, 48])
def test_layers_that_see_near_keys_alone_by_their_place(window):
    """A window longer than any probe, and texts beyond it."""
    config = hf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, window_size=window,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that attention matters to the argmax
    inputs = prompts([10, 7])
    expected = greedy(model, inputs, max_new_tokens=120)
    assert torch.equal(cllm.generate(model, **inputs, max_new_tokens=120, block_size=6), expected)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_of_new_tensors_is_nobodys_business(device):
    model = fresh_model("llama")
    inputs = prompts([9, 4])
    settings = dict(max_new_tokens=12, do_sample=False)
    expected = cllm.generate(model, **inputs, **settings)
    adapter = GatedAdapter.random(model, 4, targets=("q_proj",), scale=0.05, seed=0)
    with torch.device(device):
        # transformers' own preparations make tensors where they please
        found = _decoded(model, inputs, 12)
        again = GatedAdapter.random(model, 4, targets=("q_proj",), scale=0.05, seed=0)
        head = LanguageHead.of(fresh_model("llama"))
    assert torch.equal(found, expected)
    assert head.softcap is None
    for name, pair in adapter.weights.items():
        assert torch.equal(pair.a, again.weights[name].a)


def _decoded(model, inputs, new_tokens):
    with torch.device("cpu"):
        config = hf.GenerationConfig(max_length=inputs["input_ids"].shape[1] + new_tokens)
        config._pad_token_tensor = torch.tensor(0)
        criteria = hf.StoppingCriteriaList(
            [hf.generation.MaxLengthCriteria(config.max_length), *_end(model)]
        )
    return cllm.jacobi_decode(
        model,
        inputs["input_ids"],
        hf.LogitsProcessorList(),
        criteria,
        config,
        attention_mask=inputs["attention_mask"],
    )


def _end(model):
    end = model.generation_config.eos_token_id
    return [] if end is None else [hf.generation.EosTokenCriteria(end)]


def test_other_ranks_are_not_waited_for(monkeypatch):
    model, inputs = tiny_model("llama"), prompts([3])
    with pytest.raises(cllm.UnsupportedOptionError, match="synced_gpus=True"):
        cllm.generate(model, **inputs, max_new_tokens=2, synced_gpus=True)
    monkeypatch.setattr(checks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(checks.dist, "get_world_size", lambda: 2)
    expected = greedy(model, inputs, max_new_tokens=2, synced_gpus=False)
    assert torch.equal(cllm.generate(model, **inputs, max_new_tokens=2), expected)
    monkeypatch.setattr(checks.huggingface, "is_fsdp_managed_module", lambda model: True)
    with pytest.raises(cllm.UnsupportedOptionError, match="synced_gpus=True"):
        cllm.generate(model, **inputs, max_new_tokens=2)
    found = cllm.generate(model, **inputs, max_new_tokens=2, synced_gpus=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("place", ["argument", "given", "own"])
def test_token_healing_is_refused(place):
    model, inputs = fresh_model("llama"), prompts([3])
    options = {}
    if place == "argument":
        options["token_healing"] = True
    elif place == "given":
        options["generation_config"] = hf.GenerationConfig(token_healing=True)
    else:
        model.generation_config.token_healing = True
    with pytest.raises(cllm.UnsupportedOptionError, match="token_healing=True"):
        cllm.generate(model, **inputs, max_new_tokens=2, **options)


def test_peft_modes_that_count_rows_or_tokens_are_refused():
    model, inputs = fresh_model("llama"), prompts([3])
    with pytest.raises(cllm.UnsupportedOptionError, match="adapter_names"):
        cllm.generate(model, **inputs, max_new_tokens=2, adapter_names=["a"])
    model.peft_config = {"default": SimpleNamespace(alora_invocation_tokens=[5, 6])}
    with pytest.raises(cllm.UnsupportedOptionError, match="activated LoRA"):
        cllm.generate(model, **inputs, max_new_tokens=2)


def test_a_patched_model_hands_a_loop_of_ones_own_on_untouched(recwarn):
    model, inputs = fresh_model("llama"), prompts([5])
    settings = dict(
        max_new_tokens=8, do_sample=True, seed=7, block_size=3, record_trajectories=True,
        return_dict_in_generate=True, custom_generate=cllm.jacobi_decode,
    )  # fmt: skip
    expected = model.generate(**inputs, **settings)
    with cllm.patched(model, cllm.JacobiConfig(block_size=5)):
        found = model.generate(**inputs, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.block_size == 3 and len(found.trajectories) == 1
    assert not [one for one in recwarn if "transformers' own generate" in str(one.message)]


def test_a_sample_does_not_depend_on_whether_an_adapter_was_asked():
    """In 16 bits logits are rounded or not; small batches ask the adapter, large ones do not."""
    model = tiny_model("llama", torch.bfloat16)
    adapter = GatedAdapter.random(model, 4, targets="all-linear", scale=0.05, seed=0)
    inputs = prompts([6, 6, 6, 6])
    settings = dict(max_new_tokens=24, do_sample=True, top_k=0, seed=7, adapter=adapter)
    whole = cllm.generate(model, **inputs, **settings, row_ids=[4, 5, 6, 7])
    for row in range(4):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        found = cllm.generate(model, **one, **settings, row_ids=[4 + row])
        assert torch.equal(found[0], whole[row, : found.shape[1]])


@pytest.mark.parametrize("rows", [1, 4])
def test_an_adapter_that_cannot_be_used_is_refused_in_every_batch(rows):
    model = tiny_model("bloom")
    adapter = GatedAdapter.random(model, 2, targets="all-linear", scale=0.05, seed=0)
    with pytest.raises(cllm.UnsupportedModelError, match="decode it without an adapter"):
        cllm.generate(model, **prompts([4] * rows), max_new_tokens=2, adapter=adapter)


def test_a_window_that_nobody_asked_for_fits_the_context():
    config = tiny_model("llama").config.to_dict() | {"max_position_embeddings": 3}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config)).eval()
    found = cllm.generate(
        model, **prompts([2]), max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    )
    assert found.block_size == 3
    assert cllm.JacobiConfig().on("cuda", 1, context=8).width == 8
    assert cllm.JacobiConfig(verify_size=4).on("cpu", 1, gated=True, context=3).width == 4


def test_others_know_our_forwards_at_every_moment(monkeypatch):
    """They look without a lock: a module is in the table before and as long as it is ours."""
    seen = []
    own = linears.partial

    def partial(function, module, *rest):
        seen.append(linears.replaced(module))
        return own(function, module, *rest)

    monkeypatch.setattr(linears, "partial", partial)
    cllm.generate(fresh_model("gpt-neox"), **prompts([3]), max_new_tokens=2)
    assert seen and all(seen)


def test_a_head_is_proved_without_a_look_at_compiled_models_of_others(monkeypatch):
    def stance(name):
        raise AssertionError("the stance is that of the whole process")

    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    assert LanguageHead.of(fresh_model("llama")).scale == 1


def test_llama_4_beyond_its_first_temperature():
    text = hf.Llama4TextConfig(attn_temperature_tuning=True, floor_scale=8192)
    [change] = cllm.decoding.support.rope_changes(text)
    assert change.threshold == 8192 - 1024 and not change.once
    text = hf.Llama4TextConfig(attn_temperature_tuning=False)
    assert not cllm.decoding.support.rope_changes(text)
