"""Adapters that cannot be used are refused in one line that says why."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import cllm
from cllm import AdapterError, GatedAdapter
from cllm.adapter import LowRank

from ..decoding.tiny_models import fresh_model, prompts, tiny_model
from .adapters import peft_model


@pytest.fixture
def folder(tmp_path):
    return GatedAdapter.random(tiny_model("llama"), 2).save(tmp_path)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(message):
    """A one-line AdapterError that matches `message`."""
    return pytest.raises(AdapterError, match=f"(?s)^[^\n]*{message}[^\n]*$")


UP = "model.layers.0.mlp.up_proj"
KEY = f"base_model.model.{UP}.lora_{{}}.weight"


def test_another_bases_names():
    adapter = GatedAdapter.random(tiny_model("gpt2"), 2)
    with refused("weights for transformer.h.0.attn.c_attn, which LlamaForCausalLM does not have"):
        adapter.check(tiny_model("llama"))


def test_another_bases_shapes():
    adapter = GatedAdapter.random(tiny_model("llama"), 2)
    pair = adapter.weights[UP]
    adapter.weights[UP] = LowRank(pair.a[:, :-1], pair.b, 1.0)
    with refused(f"weights for {UP} map 31 features to 48, but in LlamaForCausalLM it maps 32"):
        adapter.check(tiny_model("llama"))


def test_another_bases_weights():
    adapter = GatedAdapter.random(tiny_model("llama"), 2)
    other = fresh_model()
    with torch.no_grad():
        other.model.embed_tokens.weight.neg_()
    with refused("trained for other weights"):
        cllm.generate(other, **prompts([4]), max_new_tokens=2, adapter=adapter)
    adapter.check(fresh_model().bfloat16())
    adapter.check(fresh_model().half())  # rounded once more: names and shapes only


def test_ranks_that_do_not_fit(folder):
    edit_config(folder, r=3)
    with refused(r"rank 3 for model.+, but its lora_A is \[2, "):
        GatedAdapter.load(folder)
    with refused("must be .rank, in. and .out, rank. of one rank"):
        GatedAdapter({UP: LowRank(torch.zeros(2, 32), torch.zeros(48, 3), 1.0)})


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, letter, value):
    def spoil(tensors):
        tensors[KEY.format(letter)][0, 0] = value

    edit_tensors(folder, spoil)
    with refused(f"lora_{letter} of {UP} holds NaN or infinity"):
        GatedAdapter.load(folder)


def test_live_weights_that_are_no_numbers():
    peft = peft_model()
    with torch.no_grad():
        next(p for name, p in peft.named_parameters() if "up_proj.lora_B" in name)[0, 0] = torch.nan
    with refused(f"lora_B of {UP} holds NaN"):
        cllm.generate(peft, **prompts([4]), max_new_tokens=2, adapter=peft)


def test_merged_models(tmp_path):
    peft = peft_model()
    peft.merge_adapter()
    with refused("merged into the base weights"):
        GatedAdapter.from_peft(peft)
    with refused("merged into the base weights"):
        adapter = GatedAdapter(GatedAdapter.random(tiny_model("llama"), 2).weights, {"gated": True})
        cllm.generate(peft, **prompts([4]), max_new_tokens=2, adapter=adapter)
    unloaded = peft_model().merge_and_unload()
    with refused("no LoRA layers: it never had an adapter, or the adapter was merged"):
        GatedAdapter.from_peft(unloaded)
    unloaded.save_pretrained(tmp_path)
    with refused("it holds a whole model; an adapter that was merged"):
        GatedAdapter.load(tmp_path)


def test_a_base_that_the_adapter_was_merged_into():
    peft = peft_model()
    adapter = GatedAdapter.random(tiny_model("llama"), 2)
    with refused("or one that an adapter was merged into"):
        adapter.check(copy.deepcopy(peft).merge_and_unload())


def test_a_quantised_base():
    adapter = GatedAdapter.random(tiny_model("llama"), 2)
    model = fresh_model()
    layer = model.get_submodule(UP)  # as bitsandbytes keeps its eight bits
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with refused(f"targets {UP}, a Linear, which is no linear layer with plain floating-point"):
        adapter.check(model)
    model = fresh_model()
    model.is_quantized = True  # what transformers sets on the models that it quantises
    with refused("LlamaForCausalLM is quantised"):
        adapter.check(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
        ({"r": "two"}, "r and lora_alpha as numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_more_than_plain_lora(folder, changes, message):
    edit_config(folder, **changes)
    with refused(message):
        GatedAdapter.load(folder)


def test_live_models_with_more_than_plain_lora():
    with refused("use_dora"):
        GatedAdapter.from_peft(peft_model(use_dora=True))
    with refused("modules_to_save"):
        GatedAdapter.from_peft(peft_model(modules_to_save=["lm_head"]))
    with refused("targets the embedding model.embed_tokens"):
        GatedAdapter.from_peft(peft_model(target_modules=["embed_tokens", "q_proj"]))


@pytest.mark.parametrize(
    "key", ["lora_embedding_A", "q_proj.lora_magnitude_vector.weight", "lm_head.weight"]
)
def test_tensors_that_are_no_low_rank_weights(folder, key):
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(2)}))
    with refused(f"the adapter holds {key}, which is no low-rank weight"):
        GatedAdapter.load(folder)


def test_half_a_pair(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(KEY.format("B")))
    with refused(f"one of lora_A and lora_B of {UP}"):
        GatedAdapter.load(folder)


def test_damaged_and_missing_files(folder, tmp_path):
    (folder / "adapter_model.safetensors").write_bytes(b"no safetensors")
    with refused("cannot read .*adapter_model.safetensors"):
        GatedAdapter.load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with refused("has no adapter_model.safetensors; save the adapter as safetensors"):
        GatedAdapter.load(folder)
    (folder / "adapter_config.json").write_text("{")
    with refused("cannot read .*adapter_config.json"):
        GatedAdapter.load(folder)
    (folder / "adapter_config.json").unlink()
    with refused("it has no adapter_config.json"):
        GatedAdapter.load(folder)
    with refused("neither a folder nor a hub id"):
        GatedAdapter.load(tmp_path / "nowhere")


def test_a_hub_id_without_the_hub():
    with refused("no adapter at nobody/nothing-of-this-name"):
        GatedAdapter.load("nobody/nothing-of-this-name")


def test_several_active_adapters():
    from peft import LoraConfig

    peft = peft_model()
    peft.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    peft.base_model.set_adapter(["default", "second"])
    with refused(r"2 active adapters \(default, second\)"):
        GatedAdapter.from_peft(peft)
    assert GatedAdapter.from_peft(peft, "second").ranks == (2,)
    with refused("no adapter is called 'third'; there are default, second"):
        GatedAdapter.from_peft(peft, "third")


def test_not_trained_with_the_gate_is_one_warning():
    model = tiny_model("llama")
    adapter = GatedAdapter(GatedAdapter.random(model, 2).weights)
    with pytest.warns(UserWarning, match="does not say that it was trained with the gate"):
        adapter.check(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.check(model)
        adapter.check(fresh_model())
        GatedAdapter.random(model, 2).check(model)


def test_a_target_that_does_not_see_the_windows_tokens():
    """Multi-head latent attention expands the whole cache by one of its projections."""
    model = tiny_model("deepseek-v3")
    adapter = GatedAdapter.random(model, 2)
    with pytest.raises(cllm.UnsupportedModelError, match="kv_b_proj does not see the window's tok"):
        cllm.generate(model, **prompts([4]), max_new_tokens=4, adapter=adapter)


@pytest.mark.parametrize("verify_size", [0, -1, 9, 2.0, True])
def test_verify_size_out_of_range(verify_size):
    with pytest.raises(ValueError, match="verify_size must be None or an integer from 1 to block"):
        cllm.JacobiConfig(block_size=8, verify_size=verify_size)


def test_verify_size_where_it_means_nothing():
    with pytest.raises(ValueError, match="must equal block_size=8 in block mode"):
        cllm.JacobiConfig(block_size=8, verify_size=4, mode="block")
    message = "verify_size=4 is about decoding with an adapter"
    with pytest.raises(ValueError, match=message):
        cllm.generate(tiny_model("llama"), **prompts([4]), max_new_tokens=2, verify_size=4)
    with pytest.raises(ValueError, match=message):
        cllm.patch(tiny_model("llama"), cllm.JacobiConfig(verify_size=4))


def test_what_is_no_adapter():
    with pytest.raises(TypeError, match="a folder, a hub id or a PEFT model, not int"):
        cllm.generate(tiny_model("llama"), **prompts([4]), max_new_tokens=2, adapter=3)
    with refused("the adapter has no weights"):
        GatedAdapter({})
    with pytest.raises(ValueError, match="rank must be >= 1, not 0"):
        GatedAdapter.random(tiny_model("llama"), 0)
    with refused("no linear layer called"):
        GatedAdapter.random(tiny_model("llama"), 2, targets=("c_attn",))


@pytest.mark.parametrize("family", ["bloom", "falcon-alibi", "gpt-neo"])
def test_models_that_read_positions_off_the_keys_places(family):
    model = tiny_model(family)
    with pytest.raises(cllm.UnsupportedModelError, match=r"twice|two rows cannot share one"):
        cllm.generate(
            model, **prompts([4]), max_new_tokens=4, adapter=GatedAdapter.random(model, 2)
        )
