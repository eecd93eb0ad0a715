"""Past the model's own forward: the same bits, and nobody who listens is passed over."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

import cllm
from cllm.decoding import walk
from cllm.decoding.forward import BlockForward
from cllm.decoding.support import check_model

from .test_gated import greedy, random_adapter
from .test_native_layers import FAMILIES, NATIVE, layout_of, needs_native
from .tiny_models import SIZES, prompts, tiny_model

pytestmark = needs_native
# relative, in the 2-norm: rounding through three layers
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}


def forwards(model, ids, lengths, *, position_limit=None):
    """Two that have read the same prompts: past the model's own forward, and through it."""
    made = []
    for walks in (True, False):
        block = BlockForward(
            model,
            check_model(model),
            batch=2,
            slots=ids.shape[1] + 20,
            device=ids.device,
            position_limit=position_limit,
            layout=NATIVE,
        )
        block.prefill(ids[:, : int(lengths.max())], lengths)
        assert block.walk is not None
        if not walks:
            block.walk = None
        made.append(block)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_models_own_forward(family, dtype):
    """To the bit: windows, windows that stand twice and candidates, of rows of two lengths, the
    longer of which comes to the end of its positions."""
    model, adapter = tiny_model(family, dtype), random_adapter(family, 0.05)
    ids = prompts([90, 80], seed=3)["input_ids"]
    lengths = torch.tensor([70, 80])
    tokens, longer = ids[:, -6:].contiguous(), ids[:, -8:].contiguous()
    host = lengths.tolist()
    with NATIVE.applied(model), adapter.applied(model) as gate:
        found = []
        for block in forwards(model, ids, lengths, position_limit=83):
            plain = block.window(tokens, lengths, host)
            with gate.open(4, 2, 12):
                gated = block.gated_window(longer, 4, lengths, host)
            # as many rows as the window that stands twice, in three chains
            three = torch.stack([tokens[:, :4], tokens[:, :4].flip(1), tokens[:, 2:]], dim=1)
            several = block.candidate_windows(three, lengths, host)
            found.append((plain, gated, several))
    for walked, own in zip(*found, strict=True):
        assert torch.equal(walked, own)
    gated = found[0][1]
    assert not torch.equal(gated[:, 4:8], gated[:, :4])  # the adapter was heard


ROTATIONS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROTATIONS)
@torch.no_grad()
def test_every_scaling_of_rotary_positions(kind):
    """Also those whose angles change once the text is longer than the model was made for."""
    rotation = {"rope_type": kind, "rope_theta": 10000.0, **ROTATIONS[kind]}
    longest = 64 if kind == "dynamic" else 256
    config = hf.LlamaConfig(**SIZES, head_dim=8, max_position_embeddings=longest)
    config.rope_parameters = rotation
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    ids, lengths = prompts([80, 80])["input_ids"], torch.tensor([70, 61])
    tokens = ids[:, -6:].contiguous()
    with NATIVE.applied(model):
        walked, own = forwards(model, ids, lengths)
        for shift in (0, 2):
            places = lengths + shift
            given = [b.window(tokens, places, places.tolist()) for b in (walked, own)]
            assert torch.equal(*given)
    # and alone, where a row of the table is a slice; a prompt beyond what the model was made for
    beyond = torch.randint(3, 97, (1, 150))
    if kind == "dynamic":
        beyond = beyond[:, :30]
    alone = decoded(model, {"input_ids": beyond}).sequences
    assert torch.equal(alone, greedy(model, {"input_ids": beyond}, max_new_tokens=24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prompts_in_pieces(family, dtype, monkeypatch):
    """Whatever the pieces, keys and values are the same to the bit, and up to rounding those of the
    model's own forward; a cache that grows among them, too."""
    model, lengths = tiny_model(family, dtype), torch.tensor([700, 640])
    ids = prompts([700, 700], seed=3)["input_ids"]
    found = []
    with NATIVE.applied(model):
        for rows in (128, 34, 0):
            monkeypatch.setattr(walk, "PIECE_ROWS", rows)
            block = forwards(model, ids, lengths)[0]
            found.append([layer.stored() for layer in block.cache.ragged])
    for whole, small, own in zip(*found, strict=True):
        for one, other, theirs in zip(whole, small, own, strict=True):
            assert torch.equal(one[:, :700], other[:, :700])
            difference = (one[:, :700].double() - theirs[:, :700].double()).norm()
            assert difference <= BOUNDS[dtype] * theirs[:, :700].double().norm()


@pytest.mark.parametrize("reason", ["long", "many", "tiles"])
def test_prompts_that_torch_is_faster_for(reason, monkeypatch):
    dtype = torch.bfloat16 if reason == "tiles" else torch.float32
    model, inputs = tiny_model("llama", dtype), prompts([9, 4])
    expected = decoded(model, inputs).sequences
    if reason == "tiles":
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    else:
        name = {"long": "LONGEST_PROMPT", "many": "PIECE_ROWS"}[reason]
        monkeypatch.setattr(walk, name, {"long": 7, "many": 1}[reason])
    count = calls_of(model, monkeypatch)
    assert torch.equal(decoded(model, inputs).sequences, expected)
    assert count == [1]


def calls_of(model, monkeypatch):
    """How often the model's own forward runs, counted where no module can tell."""
    kind, count = type(model.model), [0]
    own = kind.forward

    def forward(self, *args, **kwargs):
        count[0] += 1
        return own(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return count


def decoded(model, inputs, **settings):
    return cllm.generate(
        model, **inputs, max_new_tokens=24, block_size=5, return_dict_in_generate=True, **settings
    )


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 3}], ids=["greedy", "sample"])
def test_a_call_walks_past_it(settings, monkeypatch):
    """Fused samples, which are made of hidden states, too."""
    model, inputs = tiny_model("llama"), prompts([9, 4])
    expected = decoded(model, inputs, **settings)
    count = calls_of(model, monkeypatch)
    found = decoded(model, inputs, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.forwards > 1 and count == [0]


def on(module):
    def listen(model, heard):
        found = model.get_submodule(module)
        found.register_forward_hook(lambda *_: heard.append(1))

    return listen


def everywhere(model, heard):
    def hook(module, *_):
        if module is model.model.layers[1]:
            heard.append(1)

    return torch.nn.modules.module.register_module_forward_hook(hook)


LISTENERS = {
    "model": on(""),
    "decoder": on("model"),
    "embedding": on("model.embed_tokens"),
    "rotary": on("model.rotary_emb"),
    "norm": on("model.norm"),
    "head": on("lm_head"),
    "global": everywhere,
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_a_hook_hears_every_forward(listener):
    model, inputs, heard = copy.deepcopy(tiny_model("llama")), prompts([9, 4]), []
    decoded(model, inputs)  # the probe of its layout
    handle = LISTENERS[listener](model, heard)
    try:
        found = decoded(model, inputs)
    finally:
        if handle is not None:
            handle.remove()
    assert torch.equal(found.sequences, greedy(model, inputs, max_new_tokens=24))
    assert len(heard) >= 1 + found.forwards


def test_a_hook_that_comes_during_a_call_is_heard():
    """On a layer, where the model's own forward goes from then on."""
    model, inputs, heard = copy.deepcopy(tiny_model("llama")), prompts([9]), []
    layout_of(model)

    class Streamer:
        def put(self, tokens):
            if not heard and tokens.numel() < 9:
                on("model.layers.1")(model, heard)
                heard.append(0)

        def end(self):
            heard.append(2)

    found = decoded(model, inputs, streamer=Streamer())
    assert heard.count(1) == found.forwards - 1
