"""Prompts that are padded to few widths, and the captures of forwards over them."""

from __future__ import annotations

import copy
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import import_utils

import cllm
from cllm.decoding import attention, forward, graphs, layouts, prefill, shelf
from cllm.decoding.forward import BlockForward
from cllm.decoding.layouts import choose_layout
from cllm.decoding.support import check_model

from .test_automatic_graphs import played  # noqa: F401, a fixture
from .test_gated import greedy, random_adapter
from .test_graphs import graphed, recorder  # noqa: F401, a fixture
from .tiny_models import prompts, tiny_model

FAMILIES = ("llama", "gemma2", "gpt2", "mistral", "deepseek-v3")


@pytest.mark.parametrize(
    ("batch", "width", "weights", "expected"),
    [
        (1, 1, 10**9, 64),
        (1, 64, 10**9, 64),
        (3, 65, 10**9, 128),
        (1, 8192, 10**8, 8192),
        (1, 8193, 10**8, None),
        (64, 128, 10**8, 128),
        (64, 129, 10**8, None),
        (1, 1000, 7 * 10**9, None),
        (1, 960, 7 * 10**9, 960),
    ],
)
def test_what_is_padded(batch, width, weights, expected):
    assert prefill.padded_width(batch, width, weights) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[9, 4], [1, 70], [130]], ids=str)
def test_the_text_is_the_same(family, lengths, recorder):  # noqa: F811
    model = copy.deepcopy(tiny_model(family))
    expected = greedy(model, prompts(lengths), max_new_tokens=20)
    for _ in range(2):
        found = graphed(model, prompts(lengths), max_new_tokens=20)
        assert torch.equal(found.sequences, expected)
    assert recorder.prefills.captures == 1 and recorder.prefills.replays == 2


def test_lengths_share_a_capture(recorder):  # noqa: F811
    model = copy.deepcopy(tiny_model("llama"))
    for seed, (lengths, captures) in enumerate(
        (([65, 4], 1), ([9, 4], 1), ([2, 3], 1), ([66, 4], 2), ([129, 100], 2), ([20, 65], 2))
    ):
        inputs = prompts(lengths, seed=seed)
        found = graphed(model, inputs, max_new_tokens=20)
        assert torch.equal(found.sequences, greedy(model, inputs, max_new_tokens=20))
        assert recorder.prefills.captures == captures
        assert recorder.prefills.replays == seed + 1
    before = graphs.kept_bytes(model)
    assert before > 0
    for lengths in ([3, 1], [70, 1], [140, 1]):  # one is new
        graphed(model, prompts(lengths), max_new_tokens=8)
    assert graphs.kept_bytes(model) == before + 2 * 192 * 8 + 2 * (2 * 8)


def test_the_latest_widths_stay(recorder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(prefill, "MOST_KEPT", 2)
    model = copy.deepcopy(tiny_model("llama"))
    for length, captures in ((9, 1), (70, 2), (9, 2), (140, 3), (9, 3), (70, 4)):
        graphed(model, prompts([length]), max_new_tokens=8)
        assert recorder.prefills.captures == captures


def test_nobody_asked(played):  # noqa: F811
    """The first call has no graph at all, the second none of a width that may not come again."""
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    expected = greedy(model, inputs, max_new_tokens=20)
    for captures in (0, 0, 1, 1):
        found = graphed(model, inputs, max_new_tokens=20, compile=None)
        assert torch.equal(found.sequences, expected)
        assert played.prefills.captures == captures
    assert played.captures == 1


def test_what_cannot_be_captured_costs_no_other_graph(recorder, monkeypatch, caplog):  # noqa: F811
    tried = []

    def fails(run, pool):
        tried.append(pool)
        run()
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(prefill, "capture", fails)
    monkeypatch.setattr(prefill, "MOST_KEPT", 1)
    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    expected = greedy(model, inputs, max_new_tokens=20)
    with caplog.at_level(logging.INFO, logger="cllm"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            found = graphed(model, inputs, max_new_tokens=20)
            assert torch.equal(found.sequences, expected)
    told = [one for one in caplog.messages if "over prompts of [2, 64] tokens" in one]
    assert len(told) == 1 and "operation not permitted" in told[0]
    assert recorder.captures == 1 and recorder.replays > 3
    # others do not make it forget that
    for length in (70, 140, 9):
        graphed(model, prompts([length, 4]), max_new_tokens=20)
    assert len(tried) == 3


def test_no_memory_for_it(recorder, monkeypatch):  # noqa: F811
    tried = []

    def short(run, pool):
        tried.append(pool)
        raise torch.OutOfMemoryError("no memory")

    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    graphed(model, prompts([9, 4, 2]), max_new_tokens=20)
    assert len(shelf._kept[model]) == 1
    monkeypatch.setattr(prefill, "capture", short)
    found = graphed(model, inputs, max_new_tokens=20)
    assert torch.equal(found.sequences, greedy(model, inputs, max_new_tokens=20))
    # those of the other shape made room, and this one's iterations are captured
    assert len(shelf._kept[model]) == 1 and recorder.captures == 2
    for length in (9, 70):  # nothing is put out again for it
        graphed(model, prompts([length, 4]), max_new_tokens=20)
    assert len(tried) == 1 and recorder.captures == 2


def test_widths_that_take_turns_are_not_captured_in_every_call(monkeypatch):
    monkeypatch.setattr(prefill, "MOST_KEPT", 2)
    made = []
    found = prefill.Prefills()

    def find(width, asked=False):
        return found.find(
            width, lambda: made.append(width) or SimpleNamespace(nbytes=1), asked=asked
        )

    for _ in range(5):
        for width in (64, 128, 192):
            find(width)
    assert made == [64, 128]
    assert find(192) is not None and made == [64, 128, 192]  # twice, and 64 not meanwhile
    assert find(128) is not None and find(64) is None
    assert find(64, asked=True) is not None and made == [64, 128, 192, 64]
    assert found.nbytes == 2
    found.clear()
    assert found.nbytes == 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_captured_prompt_has_the_mask_of_any_other(family, monkeypatch):
    """transformers up to 5.17 leaves no mask to the kernel while a stream is captured."""
    model, seen = tiny_model(family), []
    own = attention.sdpa_attention_forward

    def watched(module, query, key, value, mask, **options):
        seen.append(None if mask is None else tuple(mask.shape))
        return own(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    masks = attention.cllm_attention_forward
    traits, ids = check_model(model), torch.arange(3, 12)[None]
    assert masks is not None
    layout = layouts.Layout(False, "folded")
    found = []
    for capturing in (False, True):
        monkeypatch.setattr(attention, "_capturing", lambda capturing=capturing: capturing)
        if capturing:
            monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        seen.clear()
        block = BlockForward(
            model, traits, batch=1, slots=32, device=ids.device, position_limit=None, layout=layout
        )
        with torch.no_grad(), layout.applied(model):
            block.prefill(ids, torch.tensor([9]))
        found.append((list(seen), [one.stored() for one in block.cache.layers]))
    assert found[0][0] == found[1][0]
    if family == "llama":
        assert found[0][0] == [None] * 3
    for plain, captured in zip(found[0][1], found[1][1], strict=True):
        assert all(torch.equal(*pair) for pair in zip(plain, captured, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_stands_at_no_position_that_the_model_has_not(family, recorder):  # noqa: F811
    """A context that is no multiple of the step, and learned positions: an index out of bounds."""
    model = copy.deepcopy(tiny_model(family))
    if family == "gpt2":
        model.config.n_positions = 200
        model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:200])
        model.transformer.wpe.num_embeddings = 200
    inputs = prompts([195, 3])
    found = graphed(model, inputs, max_new_tokens=5)
    assert torch.equal(found.sequences, greedy(model, inputs, max_new_tokens=5))
    assert recorder.prefills.captures == 1


def test_only_forwards_of_fixed_shapes_are_padded(monkeypatch):
    model = tiny_model("gemma2")
    widths = []
    own = forward.padded
    monkeypatch.setattr(
        forward, "padded", lambda ids, width: widths.append(width) or own(ids, width)
    )
    traits = check_model(model)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        layout = choose_layout(model, traits, ids[0], 4)
    widths.clear()
    for fixed, width in ((False, 9), (True, 64)):
        block = BlockForward(
            model, traits, batch=1, slots=512, device=ids.device, position_limit=None,
            layout=layout, fixed=fixed,
        )  # fmt: skip
        with torch.no_grad(), layout.applied(model):
            block.prefill(ids, torch.tensor([9]))
        assert widths.pop() == width


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_on_a_gpu(family, monkeypatch):
    captures, own = [], prefill.capture

    def count(run, pool):
        given = own(run, pool)
        captures.append(run)
        return given

    monkeypatch.setattr(prefill, "capture", count)
    model = copy.deepcopy(tiny_model(family)).cuda()
    adapter = random_adapter(family, 0.05) if family in ("llama", "gemma2") else None
    for seed, lengths in enumerate(([9, 4], [60, 65], [1, 2], [3, 130], [120, 90])):
        inputs = {name: one.cuda() for name, one in prompts(lengths, seed=seed).items()}
        expected = greedy(model, inputs, max_new_tokens=30)
        for guessing in (None, adapter):
            found = graphed(model, inputs, max_new_tokens=30, adapter=guessing)
            assert torch.equal(found.sequences, expected)
            torch.cuda.empty_cache()  # what a capture reads and nobody holds would be gone now
            torch.full((1 << 24,), float("nan"), device="cuda")
    # three widths; with an adapter as many again, over another cache
    routed = family == "deepseek-v3"  # its experts are chosen on the host
    assert len(captures) == (0 if routed else 3 if adapter is None else 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_first_call_gives_the_later_ones_bits_on_a_gpu(monkeypatch):
    captures, own = [], prefill.capture
    monkeypatch.setattr(
        prefill, "capture", lambda run, pool: captures.append(run) or own(run, pool)
    )
    model = copy.deepcopy(tiny_model("llama", torch.bfloat16)).cuda()
    inputs = {name: one.cuda() for name, one in prompts([50, 4, 17]).items()}
    texts = [
        cllm.generate(model, **inputs, block_size=6, max_new_tokens=120).tolist() for _ in range(4)
    ]
    assert all(text == texts[0] for text in texts) and len(captures) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_captured_prompt_leaves_the_same_keys_and_values_on_a_gpu(family, dtype):
    model = copy.deepcopy(tiny_model(family, dtype)).cuda()
    traits = check_model(model)
    inputs = [prompts([length])["input_ids"].cuda() for length in (50, 60, 130, 70)]
    layout = choose_layout(model, traits, inputs[0][0], 4)
    shape = dict(batch=1, slots=512, device=inputs[0].device, position_limit=None, layout=layout)
    plain = BlockForward(model, traits, **shape, fixed=True)
    captured = graphs.GraphedForward(model, traits, **shape)
    with torch.no_grad(), layout.applied(model):
        for ids in inputs:
            length = ids.shape[1]
            for one in (plain, captured):
                one.prefill(ids, torch.tensor([length], device=ids.device))
            for mine, theirs in zip(plain.cache.layers, captured.cache.layers, strict=True):
                for a, b in zip(mine.stored(), theirs.stored(), strict=True):
                    assert torch.equal(a[:, :length], b[:, :length])
    assert len(captured.prefills._made) == 3
