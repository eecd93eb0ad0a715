"""Prompts that are padded to few widths, and the captures of forwards over them."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch

import cllm
from cllm.decoding import forward, graphs, prefill, shelf
from cllm.decoding.forward import BlockForward, choose_layout
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
    def fails(run):
        run()
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(prefill, "capture", fails)
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


def test_no_memory_for_it(recorder, monkeypatch):  # noqa: F811
    def short(run):
        raise torch.OutOfMemoryError("no memory")

    model, inputs = copy.deepcopy(tiny_model("llama")), prompts([9, 4])
    graphed(model, prompts([9, 4, 2]), max_new_tokens=20)
    assert len(shelf._kept[model]) == 1
    monkeypatch.setattr(prefill, "capture", short)
    found = graphed(model, inputs, max_new_tokens=20)
    assert torch.equal(found.sequences, greedy(model, inputs, max_new_tokens=20))
    # those of the other shape made room, and this one's iterations are captured
    assert len(shelf._kept[model]) == 1 and recorder.captures == 2


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
    model = tiny_model("llama")
    widths = []
    own = forward.padded
    monkeypatch.setattr(
        forward, "padded", lambda ids, width: widths.append(width) or own(ids, width)
    )
    traits = check_model(model)
    ids = torch.arange(3, 12)[None]
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

    def count(run):
        given = own(run)
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
    monkeypatch.setattr(prefill, "capture", lambda run: captures.append(run) or own(run))
    model = copy.deepcopy(tiny_model("llama", torch.bfloat16)).cuda()
    inputs = {name: one.cuda() for name, one in prompts([50, 4, 17]).items()}
    texts = [
        cllm.generate(model, **inputs, block_size=6, max_new_tokens=120).tolist() for _ in range(4)
    ]
    assert all(text == texts[0] for text in texts) and len(captures) == 1
