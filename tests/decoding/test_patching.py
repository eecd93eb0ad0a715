"""Patching is per instance, idempotent and leaves nothing behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import cllm

from .tiny_models import fresh_model, prompts, tiny_model

GREEDY = dict(max_new_tokens=20, do_sample=False)


def test_patch_and_remove():
    model, other = fresh_model(), fresh_model()
    inputs = prompts([6, 3])
    expected = model.generate(**inputs, **GREEDY)
    before = model.generate
    handle = cllm.patch(model, cllm.JacobiConfig(block_size=8))
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert isinstance(output, cllm.JacobiOutput)
    assert torch.equal(output.sequences, expected)
    assert "generate" not in other.__dict__
    handle.remove()
    assert model.generate == before and "generate" not in model.__dict__
    assert not any("cllm" in name for name in model.__dict__)
    handle.remove()
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_an_instance_attribute_is_restored_as_the_very_same_object():
    model = fresh_model()

    def own_generate(*args, **kwargs):
        return type(model).generate(model, *args, **kwargs)

    model.generate = own_generate
    handle = cllm.patch(model)
    assert torch.equal(
        model.generate(**prompts([4]), **GREEDY), own_generate(**prompts([4]), **GREEDY)
    )
    handle.remove()
    assert model.generate is own_generate


def test_patching_twice_replaces_the_settings():
    model = fresh_model()
    first = cllm.patch(model, cllm.JacobiConfig(block_size=4))
    second = cllm.patch(model, cllm.JacobiConfig(block_size=1))
    assert not first.active and second.active
    output = model.generate(**prompts([6]), **GREEDY, return_dict_in_generate=True)
    assert output.tokens_per_forward == 1.0
    first.remove()
    assert second.active
    second.remove()
    assert "generate" not in model.__dict__


def test_patched_scope_nests():
    model = fresh_model()
    with cllm.patched(model, cllm.JacobiConfig(block_size=2)):
        with cllm.patched(model, cllm.JacobiConfig(block_size=8)), pytest.raises(RuntimeError):
            raise RuntimeError
        output = model.generate(**prompts([6]), **GREEDY, return_dict_in_generate=True)
        assert isinstance(output, cllm.JacobiOutput)
    assert "generate" not in model.__dict__


def test_survives_to_saving_copying_and_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = fresh_model()
    inputs = prompts([6])
    expected = model.generate(**inputs, **GREEDY)
    cllm.patch(model)
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    unpatched = fresh_model()
    unpatched.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(unpatched.generate(**inputs, **GREEDY), expected)
    clone = copy.deepcopy(model)
    assert clone.generate.__self__ is clone
    assert torch.equal(clone.generate(**inputs, **GREEDY), expected)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wrapped.eval()
    output = wrapped.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert isinstance(output, cllm.JacobiOutput)
    cllm.patch(model).remove()
    adapted = wrapped.generate(**inputs, **GREEDY)
    assert torch.equal(output.sequences, adapted) and not torch.equal(adapted, expected)
    with cllm.patched(wrapped):
        assert torch.equal(wrapped.generate(**inputs, **GREEDY), adapted)
    assert torch.equal(cllm.generate(wrapped, **inputs, **GREEDY), adapted)


def test_huggingface_extension_point():
    model = tiny_model("qwen3")
    inputs = prompts([6, 2])
    expected = model.generate(**inputs, **GREEDY)
    found = model.generate(
        **inputs, **GREEDY, custom_generate=cllm.jacobi_decode, block_size=8, mode="block"
    )
    assert torch.equal(found, expected)


def test_generate_on_a_patched_model_uses_the_arguments_of_the_call():
    model = fresh_model()
    inputs = prompts([6])
    expected = model.generate(**inputs, **GREEDY)
    with cllm.patched(model, cllm.JacobiConfig(block_size=8)):
        output = cllm.generate(
            model, **inputs, **GREEDY, block_size=1, return_dict_in_generate=True
        )
        patched = model.generate(**inputs, **GREEDY, block_size=1, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected) and output.tokens_per_forward == 1.0
    assert torch.equal(patched.sequences, expected) and patched.tokens_per_forward == 1.0


UNSUPPORTED = {
    "sampled beams": dict(do_sample=True, num_beams=2),
    "beams": dict(num_beams=2, do_sample=False),
    "prompt lookup": dict(prompt_lookup_num_tokens=2, do_sample=False),
    "scores": dict(output_scores=True, return_dict_in_generate=True, do_sample=False),
}


@pytest.mark.parametrize("options", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_other_modes_raise_here_and_go_to_huggingface_when_patched(options):
    model = fresh_model()
    inputs = prompts([6])
    with pytest.raises(cllm.UnsupportedOptionError, match="Jacobi decoding cannot"):
        cllm.generate(model, **inputs, max_new_tokens=8, **options)
    torch.manual_seed(1)
    expected = model.generate(**inputs, max_new_tokens=8, **options)
    with cllm.patched(model):
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="goes to transformers' own generate"):
            found = model.generate(**inputs, max_new_tokens=8, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.generate(**inputs, max_new_tokens=8, **options)
    first, second = (getattr(value, "sequences", value) for value in (found, expected))
    assert torch.equal(first, second)


def test_attention_of_the_model_is_as_before():
    model = fresh_model()
    cllm.generate(model, **prompts([6]), max_new_tokens=4)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="broken"):
        cllm.generate(
            model,
            **prompts([6]),
            max_new_tokens=4,
            logits_processor=[lambda ids, scores: (_ for _ in ()).throw(RuntimeError("broken"))],
        )
    assert model.config._attn_implementation == "sdpa"
