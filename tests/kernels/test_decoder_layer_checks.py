"""What decoder_layer and its weights refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cllm_kernels
from cllm_kernels.decoder_layer.weights import plain_tensors
from tests.kernels.test_decoder_layer import MODELS, make_block, make_weights


def test_gradients_are_refused():
    """Whatever they are asked of, and from when on."""
    weights = make_weights(MODELS["more heads than one piece"], torch.float32)
    block = make_block(weights, [5], 3, 16)
    there = [tensor for tensor in plain_tensors(weights) if tensor is not None]
    assert len(weights.tensors) == len(there)
    stack = cllm_kernels.DecoderStack([weights], [block[3]], [block[4]], eps=1e-5)
    for tensor in (*block[:5], *there):
        tensor.requires_grad_()
        with pytest.raises(RuntimeError, match="no gradient"):
            cllm_kernels.decoder_layer(block[0], weights, *block[1:], eps=1e-5)
        with pytest.raises(RuntimeError, match="no gradient"):
            cllm_kernels.decoder_layers(block[0], stack, *block[1:3], block[5])
        with torch.no_grad():
            cllm_kernels.decoder_layer(block[0], weights, *block[1:], eps=1e-5)
        tensor.requires_grad_(False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(1, 3, 60)}, ValueError, r"hidden must be \[B, n, 64\]"),
        ({"cos": torch.zeros(1, 2, 32)}, ValueError, r"cos must be \[1, 3, 32\]"),
        ({"sin": torch.zeros(1, 3, 32).half()}, TypeError, "sin must be float32, not float16"),
        ({"k_cache": torch.zeros(1, 3, 16, 32)}, ValueError, r"k_cache must be \[1, 2, 16, 32\]"),
        ({"k_cache": torch.zeros(1, 2, 2, 32)}, ValueError, "3 tokens .* do not fit the 2 slots"),
        ({"lengths": torch.zeros(1)}, TypeError, "lengths must be int64, not float32"),
        ({"lengths": torch.zeros(2).long()}, ValueError, r"lengths must be \[1\]"),
        ({"hidden": torch.zeros(1, 64, 3).transpose(1, 2)}, ValueError, "hidden .* contiguous"),
        ({"window": 0}, ValueError, "window must be at least 1 or None, not 0"),
        ({"guess_width": 0}, ValueError, "guess_width must be at least 1, not 0"),
        ({"guesses_from": 4}, ValueError, "guesses_from must be from 0 to n = 3, not 4"),
        ({"gated_from": -1}, ValueError, "gated_from must be from 0 to n = 3, not -1"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, not -1.0"),
        ({"eps": float("inf")}, ValueError, "eps must be finite"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    weights = make_weights(MODELS["whole vectors"], torch.float32)
    names = ("hidden", "cos", "sin", "k_cache", "v_cache", "lengths")
    block = dict(zip(names, make_block(weights, [5], 3, 16), strict=True))
    if "k_cache" in changes:
        block["v_cache"] = changes["k_cache"]
    with pytest.raises(error, match=message):
        cllm_kernels.decoder_layer(**{"weights": weights, "eps": 1e-5} | block | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": torch.zeros(65, 64)}, ValueError, "rows of query and 65 of key must be multiples"),
        ({"key": torch.zeros(128, 64)}, ValueError, "6 query heads are no multiple of 4 key heads"),
        ({"down": torch.zeros(64, 95)}, ValueError, r"down must be \[64, 96\]"),
        ({"up": torch.zeros(96, 64).double()}, TypeError, "up is float64 but query is float32"),
        ({"gate": torch.zeros(64, 96).t()}, ValueError, "gate .* must be contiguous"),
        ({"query_norm": torch.ones(32)}, ValueError, "both or not"),
        ({"head_size": 33}, ValueError, "head_size must be even"),
        ({"gate": torch.zeros(0, 64)}, ValueError, "hidden size 64 and MLP size 0 must be at"),
        ({"query": torch.zeros(192, 0)}, ValueError, "hidden size 0 and MLP size 96 must be at"),
        ({"biases": (None,)}, ValueError, "biases must have 7 entries"),
        ({"mlp_norm": torch.ones(64, device="meta")}, ValueError, "mlp_norm is on meta"),
        (
            {"low_rank": [(torch.zeros(3, 64), torch.zeros(192, 4)), *[None] * 6]},
            ValueError,
            r"low_rank\[0\] \(query\) must be \[192, 3\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        replace(make_weights(MODELS["whole vectors"], torch.float32), **changes)


def test_weights_that_are_no_plain_tensors_are_named():
    """Such as those that quantise: there is nothing at their address."""

    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    weights = make_weights(MODELS["rests everywhere"], torch.float32)
    for name in ("query", "mlp_norm"):
        with pytest.raises(TypeError, match=f"{name} must be a plain tensor, not Wrapped"):
            replace(weights, **{name: Wrapped(getattr(weights, name))})
    pair = [(weights.low_rank[0][0], Wrapped(weights.low_rank[0][1])), *[None] * 6]
    with pytest.raises(TypeError, match=r"low_rank\[0\] \(query\) must be a plain tensor"):
        replace(weights, low_rank=pair)
    replace(weights, query=torch.nn.Parameter(weights.query))
