from __future__ import annotations

import sys

import pytest
import torch

import cllm_kernels
from cllm_kernels import DecoderStack
from cllm_kernels.decoder_layer import OP
from tests.kernels.backends import everywhere, running, slow_interpreter
from tests.kernels.test_decoder_layer import DTYPES, MODELS, make_block, make_weights

WINDOWS = [None, 5, 2]
CHOICES = {
    "a plain block": {},
    "guess rows": {"guesses_from": 2, "gated_from": 2},
    "several chains": {"guesses_from": 1, "guess_width": 2, "gated_from": 3},
}


def make_stack(model, dtype, lengths, n, *, device="cpu", windows=WINDOWS):
    """A stack of three layers, the first one with a wider cache, and the block for it."""
    weights = [make_weights(model, dtype, device, seed=seed) for seed in range(3)]
    blocks = [
        make_block(layer, lengths, n, capacity=16 + 8 * (seed == 0), seed=seed, device=device)
        for seed, layer in enumerate(weights)
    ]
    keys, values = [block[3] for block in blocks], [block[4] for block in blocks]
    hidden, cos, sin, _, _, at = blocks[0]
    return DecoderStack(weights, keys, values, eps=1e-5, windows=windows), (hidden, cos, sin, at)


def copies(stack):
    """Its caches, as they are now."""
    return [(keys.clone(), values.clone()) for keys, values in stack.caches]


def one_by_one(stack, hidden, cos, sin, lengths, **options):
    caches = copies(stack)
    for weights, (keys, values), window in zip(stack.weights, caches, stack.windows, strict=True):
        hidden = cllm_kernels.decoder_layer(
            hidden, weights, cos, sin, keys, values, lengths, eps=1e-5, window=window, **options
        )
    return hidden, caches


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@everywhere(OP)
def test_the_bits_of_one_call_a_layer(backend, device, dtype, options):
    if slow_interpreter(backend, device) and dtype != torch.float32:
        pytest.skip("test_decoder_layer.py has every type")
    models = list(MODELS.values())
    for model in models[1:2] if slow_interpreter(backend, device) else models:
        stack, (hidden, *rest) = make_stack(model, dtype, [7, 0, 4], 5, device=device)
        given = hidden.clone()
        with running(OP, backend, device):
            expected, caches = one_by_one(stack, hidden, *rest, **options)
            found = cllm_kernels.decoder_layers(hidden, stack, *rest, **options)
        assert torch.equal(found, expected)
        assert torch.equal(hidden, given)
        for mine, theirs in zip(stack.caches, caches, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(OP.unavailable("cpp", torch.device("cpu")) is not None, reason="no C++ kernels")
def test_it_is_one_call(monkeypatch):
    """And the dispatcher's way where something watches, with the same bits."""
    stack, (hidden, *rest) = make_stack(MODELS["rests everywhere"], torch.float32, [3], 4)
    expected, _ = one_by_one(stack, hidden, *rest)

    def forbidden(*args, **kwargs):
        raise AssertionError("a call for a single layer")

    # by its module's name: the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["cllm_kernels.decoder_layer.stack"], "decoder_layer", forbidden)
    assert torch.equal(cllm_kernels.decoder_layers(hidden, stack, *rest), expected)
    monkeypatch.undo()

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Watching.seen += "decoder_layer" in str(function)
            return function(*args, **(kwargs or {}))

    with Watching():
        watched = cllm_kernels.decoder_layers(hidden, stack, *rest)
    assert Watching.seen == 3 and torch.equal(watched, expected)


def test_scratch_for_the_largest_rank_serves_all():
    """A layer that needs more room than the first must not move what lies there."""
    model = MODELS["whole vectors"]
    ranks = [0, 70, 3]
    weights = [make_weights((*model[:7], rank), torch.float32, seed=rank) for rank in ranks]
    blocks = [make_block(layer, [5, 2], 9, 16, seed=0) for layer in weights]
    hidden, cos, sin, _, _, lengths = blocks[0]
    stack = DecoderStack(weights, [b[3] for b in blocks], [b[4] for b in blocks], eps=1e-5)
    expected, _ = one_by_one(stack, hidden, cos, sin, lengths, gated_from=4)
    found = cllm_kernels.decoder_layers(hidden, stack, cos, sin, lengths, gated_from=4)
    assert torch.equal(found, expected)


@everywhere(OP)
def test_a_block_that_does_not_fit_names_its_row(backend, device):
    if backend == "triton":
        pytest.skip("nothing is read back: tokens beyond the cache are not stored")
    stack, (hidden, cos, sin, _) = make_stack(
        MODELS["whole vectors"], torch.float32, [3, 5], 5, device=device
    )
    before = copies(stack)
    lengths = torch.tensor([3, 13], device=device)
    refused = pytest.raises(ValueError, match=r"lengths\[1\] = 13 .* 16 slots")
    with running(OP, backend, device), refused:
        cllm_kernels.decoder_layers(hidden, stack, cos, sin, lengths)
    if backend == "cpp":
        for mine, theirs in zip(stack.caches, before, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_gradients_are_refused():
    stack, (hidden, *rest) = make_stack(MODELS["whole vectors"], torch.float32, [3], 2)
    with pytest.raises(RuntimeError, match="no gradient"):
        cllm_kernels.decoder_layers(hidden.requires_grad_(), stack, *rest)
    stack.weights[2].down.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        cllm_kernels.decoder_layers(hidden.detach(), stack, *rest)
    with torch.no_grad():
        cllm_kernels.decoder_layers(hidden, stack, *rest)


def test_bad_stacks_are_named():
    model, other = MODELS["whole vectors"], MODELS["norms of the heads"]
    weights = [make_weights(model, torch.float32) for _ in "ab"]
    keys, values = zip(*(make_block(w, [3], 2, 8)[3:5] for w in weights), strict=True)

    def stack(weights=weights, keys=keys, values=values, **options):
        return DecoderStack(weights, keys, values, **{"eps": 1e-5, **options})

    stack()
    with pytest.raises(ValueError, match="at least one layer"):
        stack([], [], [])
    with pytest.raises(ValueError, match="v_caches must have one entry for each of the 2 layers"):
        stack(values=values[:1])
    with pytest.raises(ValueError, match="windows must have one entry for each of the 2 layers"):
        stack(windows=[4])
    with pytest.raises(ValueError, match="window must be at least 1"):
        stack(windows=[4, 0])
    with pytest.raises(ValueError, match=r"weights\[1\] have the sizes \(32, 48, 4, 4, 8\)"):
        stack([weights[0], make_weights(other, torch.float32)])
    with pytest.raises(TypeError, match="k_cache must be float32"):
        stack(keys=[keys[0], keys[1].bfloat16()])
    with pytest.raises(ValueError, match="v_cache must be"):
        stack(values=[values[0], values[1][:, :1]])
    with pytest.raises(ValueError, match=r"k_caches\[0\] must be \[B, Hkv, C, D\]"):
        stack(keys=[keys[0][0], keys[1]])
    with pytest.raises(ValueError, match="must be finite"):
        stack(scale=float("nan"))


def test_bad_blocks_are_named():
    stack, (hidden, cos, sin, lengths) = make_stack(
        MODELS["whole vectors"], torch.float32, [3, 1], 4
    )
    for changes, message in (
        ({"hidden": hidden[:, :, :3]}, r"hidden must be \[B, n, 64\]"),
        ({"lengths": lengths[:1]}, "lengths must be"),
        ({"cos": cos[:, :2]}, "cos must be"),
        ({"guesses_from": 5}, "guesses_from must be from 0 to n = 4"),
        ({"gated_from": -1}, "gated_from must be from 0 to n = 4"),
        ({"guess_width": 0}, "guess_width must be at least 1"),
    ):
        given = {"hidden": hidden, "cos": cos, "sin": sin, "lengths": lengths, **changes}
        with pytest.raises(ValueError, match=message):
            cllm_kernels.decoder_layers(given.pop("hidden"), stack, **given)


def test_tensors_that_are_no_plain_memory():
    """A sign that only the dispatcher knows of, and a table made under another default device."""
    stack, (hidden, cos, sin, lengths) = make_stack(
        MODELS["whole vectors"], torch.float32, [3], 4, windows=()
    )
    expected = cllm_kernels.decoder_layers(hidden, stack, cos, sin, lengths)
    negative = torch._neg_view(-sin)
    assert negative.is_neg()
    found = cllm_kernels.decoder_layers(hidden, stack, cos, negative, lengths)
    assert torch.equal(found, expected)
    with torch.device("meta"):
        keys, values = zip(*stack.caches, strict=True)
        other = DecoderStack(stack.weights, keys, values, eps=1e-5)
    assert torch.equal(cllm_kernels.decoder_layers(hidden, other, cos, sin, lengths), expected)
