"""Low-rank terms of some layers and of several ranks, and how they lie in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cllm_kernels
from cllm_kernels.decoder_layer import OP
from tests.kernels.backends import everywhere, running, slow_interpreter
from tests.kernels.test_decoder_layer import (
    DTYPES,
    MODELS,
    check,
    exact,
    make_block,
    make_weights,
)

MODEL = MODELS["whole vectors"]
# of query, key, value, output, gate, up and down; None: no term
RANKS = {
    "of several": (16, None, 5, 32, None, 3, 70),
    "of one of those that share an input": (None, 4, None, None, 16, None, None),
    "none at all, but one of rank 0": (0, None, None, None, None, None, None),
    "of all": (32,) * 7,
}


def with_terms(weights, ranks, stacked=False):
    """`weights` with random terms; `stacked`: the A of layers that read one input are below each
    other in memory."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape, scale):
        made = scale * torch.randn(*shape, generator=generator)
        return made.to(weights.query.device, weights.query.dtype)

    pairs = [
        None
        if rank is None
        else (
            random(rank, linear.shape[1], scale=linear.shape[1] ** -0.5),
            random(linear.shape[0], rank, scale=0.2),
        )
        for rank, linear in zip(ranks, weights.linears, strict=True)
    ]
    if stacked:
        for group in ((0, 1, 2), (4, 5)):
            there = [index for index in group if pairs[index] is not None]
            whole = torch.cat([pairs[index][0] for index in there])
            parts = whole.split([pairs[index][0].shape[0] for index in there])
            for index, part in zip(there, parts, strict=True):
                pairs[index] = part, pairs[index][1]
    return replace(weights, low_rank=pairs)


def run(weights, block, **options):
    hidden, cos, sin, keys, values, lengths = block
    caches = keys.clone(), values.clone()
    return cllm_kernels.decoder_layer(
        hidden, weights, cos, sin, *caches, lengths, eps=1e-5, **options
    )


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
def test_against_fp64(backend, device, ranks, dtype):
    if slow_interpreter(backend, device) and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 tl.dot wrongly")
    weights = with_terms(make_weights(MODEL, dtype, device), ranks)
    block = make_block(weights, [9, 0], 5, 32, device=device)
    with running(OP, backend, device):
        for guesses, gated in ((2, 2), (None, 3), (None, 0)):
            found = run(weights, block, guesses_from=guesses, gated_from=gated)
            guessed = 5 if guesses is None else guesses
            check(
                found,
                exact(
                    block[0], weights, *block[1:], window=None, guesses=guessed,
                    guess_width=None, gated=gated,
                ),
            )  # fmt: skip


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_how_they_lie_in_memory_changes_nothing(backend, device, dtype):
    plain = make_weights(MODEL, dtype, device)
    block = make_block(plain, [9, 0], 5, 32, device=device)
    with running(OP, backend, device):
        outs = [
            run(with_terms(plain, RANKS["of all"], stacked), block, gated_from=2, guesses_from=2)
            for stacked in (False, True)
        ]
        base = run(plain, block, gated_from=2, guesses_from=2)
    assert torch.equal(*outs)
    assert torch.equal(outs[0][:, :2], base[:, :2]) and not torch.equal(outs[0], base)


@everywhere(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_terms_beyond_all_numbers_stay_in_their_rows(backend, device, dtype):
    plain = make_weights(MODEL, dtype, device)
    wild = with_terms(plain, RANKS["of several"])
    for pair in wild.low_rank:
        if pair is not None:
            pair[0].fill_(torch.finfo(dtype).max)
            pair[1].fill_(torch.finfo(dtype).max)
    block = make_block(plain, [9, 0], 5, 32, device=device)
    with running(OP, backend, device):
        found = run(wild, block, gated_from=2, guesses_from=2)
        base = run(plain, block, gated_from=2, guesses_from=2)
    assert torch.equal(found[:, :2], base[:, :2]) and base.isfinite().all()
    assert not found[:, 2:].isfinite().all()


def test_what_is_below_each_other():
    triton_low_rank = pytest.importorskip("cllm_kernels.decoder_layer.triton_low_rank")
    whole = torch.arange(60.0).view(10, 6)
    first, second, third = whole.split([3, 1, 6])
    found = triton_low_rank.one_of([first, second, third])
    assert found.data_ptr() == whole.data_ptr() and torch.equal(found, whole)
    assert triton_low_rank.one_of([second]).data_ptr() == second.data_ptr()
    for parts in ([second, first], [first, third], [first, second.clone(), third]):
        found = triton_low_rank.one_of(parts)
        assert torch.equal(found, torch.cat(parts)) and found.data_ptr() != whole.data_ptr()
    # neighbours by chance are not one tensor
    other = torch.empty(0)
    other.set_(whole.untyped_storage(), 18, (1, 6), (6, 1))
    assert triton_low_rank.one_of([first, other]).data_ptr() == whole.data_ptr()


def test_layers_without_terms_are_left_out():
    triton_low_rank = pytest.importorskip("cllm_kernels.decoder_layer.triton_low_rank")
    weights = with_terms(make_weights(MODEL, torch.float32), RANKS["of several"])
    terms = triton_low_rank.gather(weights.low_rank[:3])
    assert terms.a.shape == (21, 64) and terms.begins == (0, 16, 16)
    assert [None if b is None else b.shape[1] for b in terms.b] == [16, None, 5]
    assert triton_low_rank.gather([None, None]) is None
    empty = (torch.zeros(0, 64), torch.zeros(64, 0))
    assert triton_low_rank.gather([empty]) is None
