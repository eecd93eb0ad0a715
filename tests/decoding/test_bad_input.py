"""Every wrong input has one clear line for an answer, before any forward pass."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import cllm
from cllm.decoding.support import check_model

from .tiny_models import VOCAB, fresh_model, prompts, tiny_model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size must be None, an integer >= 1 or 'auto', not 0"),
        ({"block_size": 2.5}, "block_size"),
        ({"block_size": True}, "block_size"),
        ({"mode": "tree"}, "mode must be one of 'sliding', 'block', not 'tree'"),
        ({"fill": "zeros"}, "fill must be one of"),
        ({"accept": "two"}, "accept must be one of"),
        ({"seed": -1}, "seed"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"record_trajectories": "yes"}, "record_trajectories"),
    ],
)
def test_config_names_the_bad_value(changes, message):
    with pytest.raises(ValueError, match=message):
        cllm.JacobiConfig(**changes)
    with pytest.raises(ValueError, match=message):
        cllm.generate(tiny_model("llama"), **prompts([3]), **changes)


def test_config_names_every_bad_value_at_once():
    with pytest.raises(ValueError, match=r"block_size.*; mode.*; seed"):
        cllm.JacobiConfig(block_size=-3, mode="x", seed="s")


def bad(message, **inputs):
    return pytest.param(inputs, message, id=message)


IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        bad("the prompt is empty", input_ids=torch.empty(1, 0, dtype=torch.long)),
        bad("prompt of row 1 is empty", input_ids=torch.tensor([[5, 6], [0, 0]]),
            attention_mask=torch.tensor([[1, 1], [0, 0]])),
        bad(f"token id {VOCAB}, outside", input_ids=torch.tensor([[5, VOCAB]])),
        bad("token id -1, outside", input_ids=torch.tensor([[5, -1]])),
        bad("zeros followed by ones", input_ids=IDS, attention_mask=torch.tensor([[1, 0, 1]])),
        bad("zeros followed by ones", input_ids=IDS, attention_mask=torch.tensor([[1, 1, 0]])),
        bad("zeros followed by ones", input_ids=IDS, attention_mask=torch.tensor([[0, 2, 2]])),
        bad("prompt of 257 tokens: it has more than the model's context of 256",
            input_ids=torch.full((1, 257), 5), attention_mask=torch.ones(1, 257).long()),
        bad("block_size=300 exceeds the model's context of 256", input_ids=IDS, block_size=300),
        bad("token_type_ids_of_mine", input_ids=IDS, token_type_ids_of_mine=1),
    ],
)  # fmt: skip
def test_bad_prompts(inputs, message):
    with pytest.raises(ValueError, match=message):
        cllm.generate(tiny_model("llama"), **inputs, max_new_tokens=4)


def test_inputs_that_would_be_left_out_are_refused():
    """GPT-2 adds an embedding for token types, so leaving them out would change the text."""
    inputs = prompts([3])
    with pytest.raises(cllm.UnsupportedOptionError, match="token_type_ids"):
        cllm.generate(
            tiny_model("gpt2"),
            **inputs,
            token_type_ids=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=4,
        )


def test_training_mode():
    model = fresh_model().train()
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        cllm.generate(model, **prompts([3]), max_new_tokens=4)


def test_mixed_devices():
    model = fresh_model().to("meta")
    with pytest.raises(ValueError, match="input_ids on cpu: the model is on meta; pass"):
        cllm.generate(model, **prompts([3]), max_new_tokens=4, pad_token_id=0)


def test_another_cache():
    model = tiny_model("llama")
    name = check_model(model).cache_argument
    cache = {name: hf.DynamicCache()}
    model(**prompts([3]), **cache, use_cache=True)
    with pytest.raises(cllm.UnsupportedOptionError, match=name):
        cllm.generate(model, **prompts([6]), **cache, max_new_tokens=4)


ARCHITECTURES = {
    "encoder-decoder": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB)
        ),
        "encoder-decoder",
    ),
    "recurrent": (
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=VOCAB)
        ),
        "recurrent state",
    ),
    "hybrid": (
        lambda: hf.Lfm2ForCausalLM(
            hf.Lfm2Config(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=VOCAB,
                layer_types=["conv", "full_attention"],
            )
        ),
        "conv",
    ),
}


@pytest.mark.parametrize(("build", "reason"), ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_architectures_that_cannot_rewind(build, reason):
    model = build().eval()
    for call in (cllm.patch, lambda model: cllm.generate(model, **prompts([3]))):
        with pytest.raises(cllm.UnsupportedModelError, match=reason):
            call(model)
    assert "generate" not in model.__dict__


def test_not_a_model():
    with pytest.raises(cllm.UnsupportedModelError, match="from_pretrained"):
        cllm.patch(torch.nn.Linear(2, 2))


def test_attention_that_takes_no_masks():
    model = fresh_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(cllm.UnsupportedModelError, match="set_attn_implementation"):
        cllm.patch(model)


def test_prompt_tuning_is_refused():
    from peft import PromptTuningConfig, TaskType, get_peft_model

    wrapped = get_peft_model(
        fresh_model(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    ).eval()
    with pytest.raises(cllm.UnsupportedModelError, match="virtual tokens"):
        cllm.generate(wrapped, **prompts([3]), max_new_tokens=4)


class Forgetful(hf.LlamaForCausalLM):
    """A model whose forward ignores the positions it is given."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs
    ):
        return super().forward(input_ids, past_key_values=past_key_values, **kwargs)


def test_a_model_that_would_be_decoded_wrongly_is_refused():
    model = Forgetful(tiny_model("llama").config).eval()
    with pytest.raises(cllm.UnsupportedModelError, match="does not give the logits"):
        cllm.generate(model, input_ids=IDS, max_new_tokens=4)
