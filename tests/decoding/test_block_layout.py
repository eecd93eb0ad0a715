"""The layout that hands block and cache to `block_attention`, and attn_implementation="cllm"."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers as hf

import cllm
from cllm.decoding import forward, layouts
from cllm.decoding.attention import chosen_implementation, cllm_attention
from cllm.decoding.cache import BlockPlan, RaggedLayer
from cllm.decoding.decode import right_pad
from cllm.decoding.support import check_model
from cllm_kernels.block_attention import OP

from .tiny_models import CONFIGS, prompts, tiny_model

BLOCK = layouts.Layout(False, "block")
FAMILIES = ["llama", "qwen2", "qwen2-local", "gemma2", "gemma3", "mistral", "gpt2"]


@pytest.fixture
def block_layout(monkeypatch):
    """Block attention first on the CPU too, where another layout is the default."""
    if OP.choose(torch.device("cpu"), "auto") == "reference":
        pytest.skip("the C++ kernels were not built")
    monkeypatch.setattr(layouts, "block_attention_devices", {"cpu", "cuda"})
    monkeypatch.setattr(layouts, "native_devices", set())


@torch.no_grad()
def layout_of(model) -> layouts.Layout:
    return layouts.choose_layout(model, check_model(model), prompts([9])["input_ids"][0], 8)


def cllm_model(family):
    """A tiny model that was made with attn_implementation="cllm", and the one it equals."""
    plain = tiny_model(family)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="cllm")
    model.load_state_dict(plain.state_dict())
    return model.eval(), plain


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_huggingface_greedy(family, block_layout):
    model = tiny_model(family)
    chosen = model.config._attn_implementation  # eager or sdpa, by the version of transformers
    assert layout_of(model) == BLOCK
    inputs = prompts([9, 5, 1])
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=36)
    for block_size in (1, 5, 16):
        for mode in ("sliding", "block"):
            found = cllm.generate(
                model, **inputs, max_new_tokens=36, block_size=block_size, mode=mode
            )
            assert torch.equal(found, expected), (block_size, mode)
    assert model.config._attn_implementation == chosen


@pytest.mark.parametrize(
    ("family", "attention"),
    [("gpt-oss", "folded"), ("deepseek-v3", "folded"), ("falcon", "own"), ("gpt-neo", "own")],
)
def test_what_it_cannot_do_goes_to_another_layout(family, attention, block_layout):
    """Sinks, values narrower than keys, attention asked for by name, places for positions."""
    model = tiny_model(family)
    assert layout_of(model).attention == attention
    inputs = prompts([9, 5])
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    assert torch.equal(cllm.generate(model, **inputs, max_new_tokens=20), expected)


def test_on_the_cpu_another_layout_is_the_default():
    assert layout_of(tiny_model("gemma2")) == layouts.Layout(False, "folded")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_half_precision_is_one_fixed_point(family, dtype, block_layout):
    model = tiny_model(family, dtype)
    assert layout_of(model) == BLOCK
    inputs = prompts([23])
    one = cllm.generate(model, **inputs, max_new_tokens=150, block_size=16, accept="one")
    for changes in (
        {},
        {"mode": "block"},
        {"fill": "random", "seed": 1},
        {"fill": "random", "seed": 2, "mode": "block"},
    ):
        found = cllm.generate(model, **inputs, max_new_tokens=150, block_size=16, **changes)
        assert torch.equal(found, one), changes
    torch.set_num_threads(2)  # how threads share the rows must not show either
    found = cllm.generate(model, **inputs, max_new_tokens=20, block_size=16)
    assert torch.equal(found, one[:, : found.shape[1]])


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_past_the_first_block_of_the_sum(family, block_layout):
    """The cache grows on the way, at another forward for each trajectory."""
    model = tiny_model(family, torch.bfloat16)
    inputs = prompts([150], seed=3)
    runs = [
        cllm.generate(
            model,
            **inputs,
            max_new_tokens=380,
            block_size=16,
            eos_token_id=None,
            **{"fill": fill, "mode": mode, "accept": accept},
        )
        for fill, mode, accept in (
            ("prompt", "sliding", "one"),
            ("prompt", "sliding", "all"),
            ("random", "block", "all"),
        )
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(family, dtype, block_layout):
    model = tiny_model(family, dtype)
    traits = check_model(model)
    found = []
    for seed, others in ((5, [1, 40]), (6, [40, 7])):  # the prefill is 40 wide in both
        batch = prompts([12, *others], seed)
        batch["input_ids"][0, -12:] = torch.arange(20, 32)
        padded, lengths = right_pad(batch["input_ids"], batch["attention_mask"])
        with BLOCK.applied(model), torch.no_grad():
            block = forward.BlockForward(
                model,
                traits,
                batch=3,
                slots=64,
                device=torch.device("cpu"),
                position_limit=None,
                layout=BLOCK,
            )
            block.prefill(padded, lengths)
            window = torch.cat([torch.arange(8)[None], torch.randint(3, 90, (2, 8))])
            found.append(block.window(window, lengths, lengths.tolist())[0])
    assert torch.equal(*found)


def test_a_block_that_nobody_takes_is_an_error():
    plan = BlockPlan(1, 32, torch.device("cpu"), handed=True)
    layer, other = RaggedLayer(plan), RaggedLayer(plan)
    states = torch.randn(1, 2, 4, 8)
    plan.start_prefill(4)
    layer.update(states, states)
    plan.start_window(torch.tensor([4]), [4], 4)
    keys, values = layer.update(states, states.clone())
    with pytest.raises(RuntimeError, match="did not take the block"):
        plan.check_taken()
    with pytest.raises(RuntimeError, match="did not take the block"):
        other.update(states, states)
    with pytest.raises(RuntimeError, match="other keys than its cache layer returned"):
        plan.take(keys.clone(), values)
    keys, values = layer.update(states, states.clone())
    stored, _ = plan.take(keys, values)
    assert stored.shape == (1, 2, 64, 8)
    plan.check_taken()


def test_concurrent_calls_put_the_owners_attention_back():
    model = copy.deepcopy(tiny_model("gemma2"))
    chosen = model.config._attn_implementation
    first, second = (cllm_attention(model, ("sdpa", "eager")) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.config._attn_implementation == "cllm"
    assert chosen_implementation(model.config) == chosen
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == chosen


@pytest.mark.parametrize("family", ["llama", "qwen2-local", "gemma2", "gemma3", "phi"])
def test_padding_is_not_attended_to(family):
    """Without its entry among the mask functions, transformers would make no mask at all."""
    model, plain = cllm_model(family)
    batch = prompts([13, 4, 9])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**batch, position_ids=positions).logits
        for row, kept in enumerate(batch["attention_mask"].bool()):
            ids = batch["input_ids"][row : row + 1, kept]
            for alone in (model, plain):
                wanted = alone(input_ids=ids).logits[0]
                torch.testing.assert_close(logits[row, kept], wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_and_gradients_under_the_name(family):
    model, plain = cllm_model(family)
    batch = prompts([13, 4])
    kwargs = {"do_sample": False, "max_new_tokens": 12}
    expected = plain.generate(**batch, **kwargs)
    assert torch.equal(model.generate(**batch, **kwargs), expected)
    assert torch.equal(cllm.generate(model, **batch, max_new_tokens=12), expected)
    gradients = []
    for each in (model, copy.deepcopy(plain)):
        logits = each(**batch).logits[batch["attention_mask"].bool()]
        logits.square().mean().backward()
        gradients.append(each.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_attention_sinks_are_refused_under_the_name():
    model, _ = cllm_model("gpt-oss")
    with pytest.raises(ValueError, match="no attention sinks; choose 'eager'"):
        model(**prompts([5]))


@pytest.mark.parametrize("order", ["cllm, transformers", "transformers.modeling_utils, cllm"])
def test_importing_cllm_is_enough(order):
    program = f"""
import sys
for name in {order!r}.split(", "):
    __import__(name)
    if name == "cllm" and "transformers" not in sys.modules:
        assert "torch" not in sys.modules
from transformers import AutoModelForCausalLM, GPT2Config
config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)
model = AutoModelForCausalLM.from_config(config, attn_implementation="cllm")
assert model.config._attn_implementation == "cllm"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
