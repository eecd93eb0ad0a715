"""Whatever an adapter holds, the text is the base model's: gated decoding loses nothing."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TextIteratorStreamer

import cllm
from cllm import GatedAdapter
from cllm.adapter import LowRank
from cllm.decoding import layouts

from ..adapter.adapters import digest, peft_model, scaled
from .tiny_models import CONFIGS, fresh_model, prompts, tiny_model
from .tokenizer import letters_tokenizer

PLACES = {"bloom", "falcon-alibi", "gpt-neo"}  # positions off the keys' places: refused
FAMILIES = [family for family in CONFIGS if family not in PLACES]
# deepseek's kv_b_proj sees the whole cache, not the window
TARGETS = {"deepseek-v3": ("q_a_proj", "kv_a_proj_with_mqa", "o_proj", "up_proj")}
STRENGTHS = {"mild": 0.05, "huge": 1e4, "overflowing": 1e30}  # standard deviation of weights


@cache
def random_adapter(family: str, scale: float, seed: int = 0) -> GatedAdapter:
    targets = TARGETS.get(family, "all-linear")
    return GatedAdapter.random(tiny_model(family), 4, targets=targets, scale=scale, seed=seed)


def without_effect(family: str) -> GatedAdapter:
    """With it, guess rows are the base model's too."""
    return scaled(random_adapter(family, 0.05), 0.0)


def greedy(model, inputs, **kwargs):
    return model.generate(**inputs, do_sample=False, **kwargs)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_huggingface_greedy_of_the_base(family, strength):
    model, adapter = tiny_model(family), random_adapter(family, STRENGTHS[strength])
    inputs = prompts([9, 5, 1])
    expected = greedy(model, inputs, max_new_tokens=20)
    for changes in (
        {"block_size": 1},
        {"block_size": 6},
        {"block_size": 6, "verify_size": 3},
        {"block_size": 20, "verify_size": 1, "fill": "last"},
        {"block_size": 6, "mode": "block"},
        {"block_size": 40, "mode": "block", "fill": "random"},
    ):
        found = cllm.generate(model, **inputs, max_new_tokens=20, adapter=adapter, **changes)
        assert torch.equal(found, expected), changes


@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    new_tokens=st.integers(1, 30),
    block_size=st.integers(1, 32),
    checked=st.floats(0, 1),
    mode=st.sampled_from(["sliding", "block"]),
    fill=st.sampled_from(["prompt", "last", "random", "pad"]),
    accept=st.sampled_from(["all", "one"]),
    strength=st.sampled_from(sorted(STRENGTHS)),
    seed=st.integers(0, 1000),
)
def test_any_prompt_batch_and_size(
    lengths, new_tokens, block_size, checked, mode, fill, accept, strength, seed
):
    model = tiny_model("qwen3")
    inputs = prompts(lengths, seed)
    verify_size = 1 + round(checked * (block_size - 1)) if mode == "sliding" else None
    output = cllm.generate(
        model,
        **inputs,
        max_new_tokens=new_tokens,
        block_size=block_size,
        verify_size=verify_size,
        mode=mode,
        fill=fill,
        accept=accept,
        seed=seed,
        adapter=random_adapter("qwen3", STRENGTHS[strength], seed % 3),
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, greedy(model, inputs, max_new_tokens=new_tokens))
    assert bool((output.iterations <= output.accepted).all())
    assert output.forwards == int(output.iterations.max())


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("mistral", "sdpa")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_plain_decoding_of_equal_width(family, attention, dtype):
    """In every dtype: verify rows have the bits of a plain window of v + n tokens."""
    model = copy.deepcopy(tiny_model(family, dtype))
    model.set_attn_implementation(attention)
    inputs = prompts([23, 4])
    for verify, block in ((8, 8), (3, 9)):
        expected = cllm.generate(model, **inputs, max_new_tokens=24, block_size=verify + block)
        for factor in (1.0, 1e30):
            adapter = scaled(random_adapter(family, 0.05), factor)
            for mode in ("sliding", "block") if verify == block else ("sliding",):
                found = cllm.generate(
                    model,
                    **inputs,
                    max_new_tokens=24,
                    block_size=block,
                    verify_size=verify,
                    mode=mode,
                    adapter=adapter,
                )
                assert torch.equal(found, expected), (verify, block, factor, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2"])
def test_verify_rows_have_the_bits_of_a_plain_window(family, dtype):
    """Logits, not only tokens; at two lengths, behind more context than a sliding window holds."""
    from cllm.decoding.forward import BlockForward
    from cllm.decoding.layouts import choose_layout
    from cllm.decoding.support import check_model

    model = copy.deepcopy(tiny_model(family, dtype))
    traits = check_model(model)
    ids = prompts([200, 190], seed=5)["input_ids"]
    lengths = torch.tensor([180, 190])
    tokens = ids[:, -6:].contiguous()
    with torch.no_grad():
        layout = choose_layout(model, traits, ids[0], 20, gated=True)
    forwards = []
    for _ in range(2):
        forward = BlockForward(
            model,
            traits,
            batch=2,
            slots=700,
            device=ids.device,
            position_limit=None,
            layout=layout,
        )
        forwards.append(forward)
    adapter = scaled(random_adapter(family, 0.05), 1e30)
    with torch.no_grad(), layout.applied(model), adapter.applied(model) as gate:
        for forward in forwards:
            forward.prefill(ids[:, :190], lengths)
        padded = torch.cat([tokens[:, :4], tokens], dim=1)
        plain = forwards[0].window(padded, lengths, lengths.tolist())
        with gate.open(4, 2, 10):
            gated = forwards[1].gated_window(tokens, 4, lengths, lengths.tolist())
    assert torch.equal(gated[:, :4], plain[:, :4])
    # and the guess rows, which without the adapter would be the same, are far off
    assert not torch.isclose(gated[:, 4:8], plain[:, :4], rtol=0.1).all(dim=-1).any()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_guess_rows_are_the_adapted_model_behind_the_bases_cache(family):
    """Against transformers and PEFT: a cache of the base, the window through base + LoRA."""
    from cllm.decoding.forward import BlockForward
    from cllm.decoding.layouts import choose_layout
    from cllm.decoding.support import check_model

    peft = peft_model(family, torch.float64)
    base = tiny_model(family, torch.float64)
    ids = prompts([20], seed=2)["input_ids"]
    with torch.no_grad():
        with peft.disable_adapter():
            past = peft(input_ids=ids[:, :12], use_cache=True).past_key_values
        expected = peft(input_ids=ids[:, 12:], past_key_values=past).logits
        plain = base(input_ids=ids).logits[:, 12:17]
        traits = check_model(base)
        layout = choose_layout(base, traits, ids[0], 13, gated=True)
        forward = BlockForward(
            base,
            traits,
            batch=1,
            slots=32,
            device=ids.device,
            position_limit=None,
            layout=layout,
        )
        adapter = GatedAdapter.from_peft(peft, metadata={"gated": True})
        lengths = torch.tensor([12])
        with layout.applied(base), adapter.applied(base) as gate:
            forward.prefill(ids[:, :12], lengths)
            with gate.open(5, 1, 13):
                found = forward.gated_window(ids[:, 12:], 5, lengths, [12])
    torch.testing.assert_close(found[:, :5], plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[:, 5:], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fill", ["prompt", "last"])
@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_an_adapter_without_effect_is_plain_decoding(family, mode, fill):
    """Guesses, acceptances and records are those of plain Jacobi decoding, one for one."""
    model = tiny_model(family)
    outputs = [
        cllm.generate(
            model,
            **prompts([9, 5, 1]),
            max_new_tokens=30,
            block_size=6,
            mode=mode,
            fill=fill,
            lookup=0,
            adapter=adapter,
            record_trajectories=True,
            return_dict_in_generate=True,
        )
        for adapter in (None, without_effect(family))
    ]
    assert outputs[0].trajectories == outputs[1].trajectories
    assert torch.equal(outputs[0].iterations, outputs[1].iterations)


def test_checking_fewer_tokens_caps_what_a_forward_commits():
    model = tiny_model("llama")
    output = cllm.generate(
        model,
        **prompts([9, 5]),
        max_new_tokens=40,
        block_size=8,
        verify_size=2,
        lookup=0,
        adapter=without_effect("llama"),
        record_trajectories=True,
        return_dict_in_generate=True,
    )
    records = [record for row in output.trajectories for record in row.iterations]
    assert max(record.accepted for record in records) == 2
    assert {record.exact for record in records} == {1, 2}
    assert all(len(record.window) == len(record.predictions) == 8 for record in records)
    for row in output.trajectories:
        for before, after in zip(row.iterations, row.iterations[1:], strict=False):
            kept = before.accepted
            # the next window: the last committed token, then what was drafted behind it
            assert after.window[: 9 - kept] == before.predictions[kept - 1 :]


def trained_adapter(model, prompt, text):
    """A few steps of consistency training, bare: right tokens behind wrong ones."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    peft = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    )
    weights = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    whole = torch.cat([prompt, text], dim=1)[:, :-1].expand(8, -1)
    columns = torch.arange(whole.shape[1])
    for _ in range(100):
        # from somewhere in the text on, all is guessed wrong
        start = torch.randint(prompt.shape[1], whole.shape[1], (8, 1))
        noise = torch.randint(3, 97, whole.shape)
        noisy = torch.where(columns < start, whole, noise)
        logits = peft(input_ids=noisy).logits[:, prompt.shape[1] - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.expand(8, -1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return peft.eval()


def test_a_trained_adapter_is_faster_and_changes_nothing(tmp_path, monkeypatch):
    model = fresh_model()
    before = digest(model)
    inputs = prompts([9])
    expected = greedy(model, inputs, max_new_tokens=40, eos_token_id=None)
    peft = trained_adapter(model, inputs["input_ids"], expected[:, 9:])
    settings = dict(max_new_tokens=40, block_size=8, eos_token_id=None, lookup=0)
    plain = cllm.generate(model, **inputs, **settings, return_dict_in_generate=True)
    assert digest(peft.get_base_model().model.embed_tokens) == digest(model.model.embed_tokens)
    folder = GatedAdapter.from_peft(peft, metadata={"gated": True}).save(tmp_path)
    with pytest.warns(UserWarning, match="trained with the gate"):
        from_live = cllm.generate(
            peft, **inputs, **settings, adapter=peft, return_dict_in_generate=True
        )
    for native in (True, False):
        if not native:  # as PEFT's layers are decoded
            monkeypatch.setattr(layouts, "native_devices", set())
        for adapter in (str(folder), GatedAdapter.load(folder)):
            found = cllm.generate(
                model, **inputs, **settings, adapter=adapter, return_dict_in_generate=True
            )
            assert torch.equal(found.sequences, expected)
            assert found.tokens_per_forward > 1.15 * plain.tokens_per_forward
            assert native or found.forwards == from_live.forwards
    assert torch.equal(from_live.sequences, expected)
    assert digest(model) == before


def test_a_row_does_not_depend_on_its_neighbours():
    model, adapter = tiny_model("llama"), random_adapter("llama", 0.05)
    batch = prompts([11, 2, 6])
    settings = dict(max_new_tokens=32, block_size=8, adapter=adapter, return_dict_in_generate=True)
    together = cllm.generate(model, **batch, **settings)
    for row in range(3):
        kept = batch["attention_mask"][row].bool()
        alone = cllm.generate(model, batch["input_ids"][row : row + 1, kept], **settings)
        assert int(together.iterations[row]) == int(alone.iterations[0])


def test_processors_and_stop_strings():
    model, adapter = tiny_model("llama"), random_adapter("llama", 0.05)
    inputs, tokenizer = prompts([9, 4]), letters_tokenizer()
    settings = dict(
        max_new_tokens=40, repetition_penalty=1.3, no_repeat_ngram_size=2, tokenizer=tokenizer
    )
    text = greedy(model, inputs, **settings)
    stop = tokenizer.decode(text[0, 9 + 12 : 9 + 14])
    expected = greedy(model, inputs, stop_strings=[stop], **settings)
    assert expected.shape[1] < text.shape[1] or not torch.equal(expected, text)
    for changes in ({}, {"mode": "block"}, {"verify_size": 3}):
        found = cllm.generate(
            model,
            **inputs,
            **settings,
            stop_strings=[stop],
            block_size=7,
            adapter=adapter,
            **changes,
        )
        assert torch.equal(found, expected), changes


def test_streaming():
    model, tokenizer = tiny_model("llama"), letters_tokenizer()
    inputs = prompts([6])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = cllm.generate(
        model,
        **inputs,
        max_new_tokens=24,
        adapter=random_adapter("llama", 0.05),
        streamer=streamer,
    )
    assert "".join(streamer) == tokenizer.decode(out[0, 6:])
    assert torch.equal(out, greedy(model, inputs, max_new_tokens=24))


def test_patched_with_an_adapter(tmp_path):
    model = fresh_model()
    inputs = prompts([9, 5])
    expected = greedy(model, inputs, max_new_tokens=20)
    folder = random_adapter("llama", 0.05).save(tmp_path)
    config = cllm.JacobiConfig(block_size=8, verify_size=4)
    handle = cllm.patch(model, config, adapter=folder)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20), expected)
    assert not any(module._forward_hooks for module in model.modules())
    handle.remove()
    with cllm.patched(model, config, adapter=handle.adapter):
        assert torch.equal(model.generate(**inputs, max_new_tokens=20), expected)
    assert torch.equal(
        model.generate(
            **inputs, max_new_tokens=20, custom_generate=cllm.jacobi_decode, adapter=handle.adapter
        ),
        expected,
    )


def test_a_patched_peft_model_gives_the_bases_text():
    peft, base = peft_model(), tiny_model("llama")
    inputs = prompts([9, 5])
    adapted = greedy(peft, inputs, max_new_tokens=20)
    expected = greedy(base, inputs, max_new_tokens=20)
    assert not torch.equal(adapted, expected)
    with (
        pytest.warns(UserWarning, match="trained with the gate"),
        cllm.patched(peft, adapter=peft),
    ):
        assert torch.equal(peft.generate(**inputs, max_new_tokens=20), expected)
        # what goes to transformers' own generate is the base's as well
        with pytest.warns(UserWarning, match="num_beams=2"):
            beams = peft.generate(**inputs, max_new_tokens=20, num_beams=2, do_sample=False)
        expected = base.generate(**inputs, max_new_tokens=20, num_beams=2, do_sample=False)
        assert torch.equal(beams, expected)
    assert torch.equal(greedy(peft, inputs, max_new_tokens=20), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_garbage_in_guess_rows_reaches_no_verify_row(dtype):
    """One overflowing projection at a time: of keys, of values, of what follows attention."""
    model = tiny_model("llama", dtype)
    inputs = prompts([9, 5])
    expected = cllm.generate(model, **inputs, max_new_tokens=16, block_size=8)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"):
        adapter = scaled(GatedAdapter.random(tiny_model("llama"), 2, targets=(name,)), 1e30)
        found = cllm.generate(model, **inputs, max_new_tokens=16, block_size=4, adapter=adapter)
        assert torch.equal(found, expected), name


def test_a_damaged_adapter_object_still_changes_nothing():
    """NaN weights are refused at load; if they appear later, the text is the base's even so."""
    model = tiny_model("llama")
    adapter = GatedAdapter.random(model, 2)
    adapter.check(model)
    adapter.weights = {
        name: LowRank(pair.a * float("nan"), pair.b, 1.0) for name, pair in adapter.weights.items()
    }
    inputs = prompts([9, 5])
    found = cllm.generate(model, **inputs, max_new_tokens=20, block_size=6, adapter=adapter)
    assert torch.equal(found, greedy(model, inputs, max_new_tokens=20))


def test_up_to_the_last_learned_position():
    model = tiny_model("gpt2")
    inputs = prompts([200])
    expected = greedy(model, inputs, max_new_tokens=56, eos_token_id=None)
    found = cllm.generate(
        model,
        **inputs,
        max_new_tokens=56,
        eos_token_id=None,
        block_size=32,
        adapter=random_adapter("gpt2", 0.05),
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_past_the_first_attention_block(family):
    """Beyond 512 slots the cache grows, and a sliding window may block all of a block's keys."""
    model = fresh_model(family)
    model.config.max_position_embeddings = 1024
    inputs = prompts([500, 3], seed=4)
    expected = greedy(model, inputs, max_new_tokens=40, eos_token_id=None)
    found = cllm.generate(
        model,
        **inputs,
        max_new_tokens=40,
        eos_token_id=None,
        block_size=16,
        adapter=random_adapter(family, 1e4),
    )
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = copy.deepcopy(tiny_model("llama", dtype)).cuda()
    inputs = {name: tensor.cuda() for name, tensor in prompts([9, 5, 1]).items()}
    settings = dict(max_new_tokens=100, block_size=8)
    one = cllm.generate(model, **inputs, **settings, adapter=without_effect("llama"), accept="one")
    for factor in (1.0, 1e30):
        adapter = scaled(random_adapter("llama", 0.05), factor)
        for mode in ("sliding", "block"):
            found = cllm.generate(model, **inputs, **settings, adapter=adapter, mode=mode)
            assert torch.equal(found, one), (factor, mode)
    if dtype == torch.float32:
        assert torch.equal(one, greedy(model, inputs, max_new_tokens=100))
