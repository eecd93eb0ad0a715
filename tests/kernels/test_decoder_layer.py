from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

import cllm_kernels
from cllm_kernels import DecoderWeights
from cllm_kernels.decoder_layer import OP
from cllm_kernels.decoder_layer.weights import LINEARS, from_plain, plain_tensors
from tests.kernels.backends import everywhere, running, slow_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# hidden size, MLP size, query heads, key heads, head size, and whether the heads have norms, the
# linear layers biases, and low-rank terms of which rank
MODELS = {
    "whole vectors": (64, 96, 6, 2, 32, False, False, 0),
    "rests everywhere": (40, 50, 5, 1, 10, False, True, 3),
    "norms of the heads": (32, 48, 4, 4, 8, True, False, 32),
    "more heads than one piece": (48, 33, 14, 2, 16, True, True, 5),
    "a rank above that of the GPU's kernel": (32, 48, 4, 2, 8, False, False, 70),
}
INF, NAN = float("inf"), float("nan")


def make_weights(model, dtype, device="cpu", seed=0):
    hidden, inner, heads, kv_heads, size, norms, biases, rank = model
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0, around=0.0):
        return (around + scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    shapes = [(heads * size, hidden), *[(kv_heads * size, hidden)] * 2, (hidden, heads * size)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return DecoderWeights(
        *(random(*shape, scale=shape[1] ** -0.5) for shape in shapes),
        attention_norm=random(hidden, scale=0.1, around=1.0),
        mlp_norm=random(hidden, scale=0.1, around=1.0),
        head_size=size,
        query_norm=random(size, scale=0.1, around=1.0) if norms else None,
        key_norm=random(size, scale=0.1, around=1.0) if norms else None,
        biases=[random(shape[0], scale=0.3) for shape in shapes] if biases else (),
        low_rank=[
            (random(rank, shape[1], scale=shape[1] ** -0.5), random(shape[0], rank, scale=0.2))
            for shape in shapes
        ]
        if rank
        else (),
    )


def make_block(weights, lengths, n, capacity, seed=1, device="cpu"):
    """hidden, cos, sin, both caches and lengths; the caches hold NaN where no token stands."""
    generator = torch.Generator().manual_seed(seed)
    dtype, batch = weights.query.dtype, len(lengths)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    caches = []
    for _ in "kv":
        storage = random(batch, capacity, weights.kv_heads, weights.head_size)
        for row, length in enumerate(lengths):
            storage[row, length:] = NAN
        caches.append(storage.transpose(1, 2))
    rotary = random(batch, n, weights.head_size), random(batch, n, weights.head_size)
    hidden = random(batch, n, weights.hidden_size)
    return hidden, *rotary, *caches, torch.tensor(lengths, dtype=torch.int64, device=device)


def exact(
    hidden, weights, cos, sin, k_cache, v_cache, lengths, *, window, guesses, guess_width, gated
):
    """In fp64, one token after the other, with what each sees in a list."""
    hidden, cos, sin = (tensor.cpu().double() for tensor in (hidden, cos, sin))
    caches = k_cache.cpu().double(), v_cache.cpu().double()
    size, eps = weights.head_size, 1e-5
    groups = weights.heads // weights.kv_heads

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.cpu().double()

    def project(name, x, token):
        index = LINEARS.index(name)
        out = weights.linears[index].cpu().double() @ x
        if weights.biases[index] is not None:
            out = out + weights.biases[index].cpu().double()
        if weights.low_rank[index] is not None and token >= gated:
            a, b = (tensor.cpu().double() for tensor in weights.low_rank[index])
            out = out + b @ (a @ x)
        return out

    def turned(x, row, token):
        half = torch.cat([-x[:, size // 2 :], x[:, : size // 2]], dim=1)
        return x * cos[row, token] + half * sin[row, token]

    out = torch.empty_like(hidden)
    for row in range(hidden.shape[0]):
        length = int(lengths[row])
        keys, values = [], []
        for token in range(hidden.shape[1]):
            residual = hidden[row, token]
            x = norm(residual, weights.attention_norm)
            q = project("query", x, token).view(-1, size)
            k = project("key", x, token).view(-1, size)
            if weights.query_norm is not None:
                q, k = norm(q, weights.query_norm), norm(k, weights.key_norm)
            keys.append(turned(k, row, token))
            values.append(project("value", x, token).view(-1, size))
            first = 0 if token < guesses else token - (token - guesses) % (guess_width or 99)
            position = length + token - first
            seen = [(slot, *(cache[row, :, slot] for cache in caches)) for slot in range(length)]
            seen += [(length + i - first, keys[i], values[i]) for i in range(first, token + 1)]
            seen = [one for one in seen if window is None or one[0] > position - window]
            k_seen = torch.stack([one[1] for one in seen]).repeat_interleave(groups, dim=1)
            v_seen = torch.stack([one[2] for one in seen]).repeat_interleave(groups, dim=1)
            scores = torch.einsum("hd,shd->hs", turned(q, row, token), k_seen) * size**-0.5
            mixed = torch.einsum("hs,shd->hd", scores.softmax(-1), v_seen).flatten()
            residual = residual + project("output", mixed, token)
            x = norm(residual, weights.mlp_norm)
            x = silu(project("gate", x, token)) * project("up", x, token)
            out[row, token] = residual + project("down", x, token)
    return out


def check(found, wanted):
    """fp32 within its rounding; 16-bit types within a few roundings of every step."""
    bound = {torch.float32: 2e-5, torch.bfloat16: 0.04, torch.float16: 5e-3}[found.dtype]
    error = (found.cpu().double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.max() < bound


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_against_fp64(backend, device, model, dtype):
    if slow_interpreter(backend, device) and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 tl.dot wrongly")
    weights = make_weights(model, dtype, device)
    cases = [(None, None, None), (5, None, None), (None, 3, None), (5, 2, None), (1, 0, None)]
    if dtype is torch.float32:  # several chains change what is seen, and not how it is rounded
        cases += [(None, 3, 4), (None, 1, 2), (5, 3, 3), (None, 0, 2)]
    if slow_interpreter(backend, device):
        cases = cases[3::4]  # a window and guess rows, of one chain and of several
    for window, guesses, guess_width in cases:
        block = make_block(weights, [40, 0, 3], 7, 64, device=device)
        gated = 7 if guesses is None else guesses
        found_in = [tensor.clone(memory_format=torch.preserve_format) for tensor in block]
        with running(OP, backend, device):
            found = cllm_kernels.decoder_layer(
                found_in[0],
                weights,
                *found_in[1:],
                eps=1e-5,
                window=window,
                guesses_from=guesses,
                guess_width=guess_width,
                gated_from=gated,
            )
        wanted = exact(
            block[0],
            weights,
            *block[1:],
            window=window,
            guesses=7 if guesses is None else guesses,
            guess_width=guess_width,
            gated=gated,
        )
        check(found, wanted)
        for before, after in ((block[3], found_in[3]), (block[4], found_in[4])):
            kept = guesses if guesses is not None and guess_width is None else 7
            for row, length in enumerate((40, 0, 3)):  # the block's slots, and no other
                assert after[row, :, length : length + kept].isfinite().all()
                assert torch.equal(after[row, :, :length], before[row, :, :length])
                assert after[row, :, length + 7 :].isnan().all()


@everywhere(OP)
@pytest.mark.parametrize("window", [None, 40, 65])
def test_long_texts_against_fp64(backend, device, window):
    """Tiles of keys that all rows see whole, and others."""
    if slow_interpreter(backend, device):
        pytest.skip("test_against_fp64 has what Triton's interpreter has time for")
    weights = make_weights(MODELS["more heads than one piece"], torch.float32, device)
    for guesses, guess_width in ((None, None), (2, 3)):
        block = make_block(weights, [130, 70, 31], 8, 144, device=device)
        options = {"window": window, "guess_width": guess_width}
        with running(OP, backend, device):
            found = cllm_kernels.decoder_layer(
                block[0],
                weights,
                *block[1:3],
                *(cache.clone(memory_format=torch.preserve_format) for cache in block[3:5]),
                block[5],
                eps=1e-5,
                guesses_from=guesses,
                gated_from=8 if guesses is None else guesses,
                **options,
            )
        gated = 8 if guesses is None else guesses
        wanted = exact(block[0], weights, *block[1:], guesses=gated, gated=gated, **options)
        check(found, wanted)


@everywhere(OP)
def test_one_rotary_table_for_all_rows(backend, device):
    weights = make_weights(MODELS["whole vectors"], torch.float32, device)
    hidden, cos, sin, keys, values, lengths = make_block(weights, [9, 9], 4, 16, device=device)
    outs = []
    with running(OP, backend, device):
        for table in (
            (cos[:1].contiguous(), sin[:1].contiguous()),
            (cos[:1].expand(2, -1, -1).contiguous(), sin[:1].expand(2, -1, -1).contiguous()),
        ):
            caches = keys.clone(), values.clone()
            outs.append(
                cllm_kernels.decoder_layer(hidden, weights, *table, *caches, lengths, eps=1e-5)
            )
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_rows_bits_are_its_own(dtype, data):
    """Beside other rows, in smaller blocks, by other threads, with NaN among the guess rows."""
    if OP.choose(torch.device("cpu"), "auto") != "cpp":
        pytest.skip("no C++ kernels")
    model = data.draw(st.sampled_from(list(MODELS.values())), "model")
    lengths = data.draw(st.lists(st.integers(0, 140), min_size=1, max_size=3), "lengths")
    n = data.draw(st.integers(1, 9), "n")
    window = data.draw(st.sampled_from([None, 6, 40, 70]), "window")
    weights = make_weights(model, dtype)
    block = make_block(weights, lengths, n, 182)
    options = {"eps": 1e-5, "window": window, "gated_from": n}

    def run(hidden, cos, sin, keys, values, lengths, **changes):
        caches = (cache.clone(memory_format=torch.preserve_format) for cache in (keys, values))
        return cllm_kernels.decoder_layer(
            hidden, weights, cos, sin, *caches, lengths, **options | changes
        )

    whole = run(*block)
    row = data.draw(st.integers(0, len(lengths) - 1), "row")
    alone = run(*(tensor[row : row + 1] for tensor in block))
    assert torch.equal(alone[0], whole[row])
    fewer = data.draw(st.integers(1, n), "fewer")
    short = [tensor[:, :fewer].contiguous() for tensor in block[:3]]
    assert torch.equal(run(*short, *block[3:], gated_from=fewer), whole[:, :fewer])
    # the block as verify rows, with garbage for guess rows
    twice = [torch.cat([tensor, tensor.flip(1)], dim=1) for tensor in block[:3]]
    twice[0][:, n:] *= data.draw(st.sampled_from([1.0, 1e30, NAN]), "garbage")
    gated = run(*twice, *block[3:], guesses_from=n, gated_from=n)
    assert torch.equal(gated[:, :n], whole)
    # the block as one of several candidates, at slots further back
    chains = data.draw(st.integers(2, 3), "chains")
    first = data.draw(st.integers(0, n), "tokens before them")
    several = [
        torch.cat([tensor[:, :first], *[tensor] * chains], dim=1).contiguous()
        for tensor in block[:3]
    ]
    rows = first + chains * n
    found = run(*several, *block[3:], guesses_from=first, guess_width=n, gated_from=rows)
    for start in range(first, rows, n):
        assert torch.equal(found[:, start : start + n], whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 4), "threads"))
        assert torch.equal(run(*block), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("garbage", [1e30, NAN])
@everywhere(OP)
def test_garbage_in_guess_rows_stays_there(backend, device, garbage):
    weights = make_weights(MODELS["norms of the heads"], torch.float32, device)
    lengths, n = [9, 0, 4], 3
    twice = make_block(weights, lengths, 2 * n, 24, device=device)
    outs = []
    with running(OP, backend, device):
        for factor in (1.0, garbage):
            hidden = twice[0].clone()
            hidden[:, n:] *= factor
            caches = [cache.clone(memory_format=torch.preserve_format) for cache in twice[3:5]]
            options = {"eps": 1e-5, "guesses_from": n, "gated_from": n}
            outs.append(
                cllm_kernels.decoder_layer(
                    hidden, weights, *twice[1:3], *caches, twice[5], **options
                )[:, :n]
            )
            for cache in caches:
                for row, length in enumerate(lengths):
                    assert cache[row, :, : length + n].isfinite().all()
    assert torch.equal(*outs)


@pytest.mark.parametrize("garbage", [INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@everywhere(OP)
def test_what_is_not_finite_stays_behind_the_tokens_before_it(backend, device, dtype, garbage):
    """A wrong guess that overflows must not reach the right ones in front of it."""
    weights = make_weights(MODELS["whole vectors"], dtype, device)
    for chain in ({}, {"guesses_from": 4, "guess_width": 4, "gated_from": 8}):
        n = 8 if chain else 4
        hidden, *rest = make_block(weights, [9, 0, 40], n, 64, device=device)
        outs = []
        for bad in (False, True):
            hidden = hidden.clone()
            if bad:
                hidden[:, n - 2 :] = garbage
            caches = [cache.clone(memory_format=torch.preserve_format) for cache in rest[2:4]]
            with running(OP, backend, device):
                outs.append(
                    cllm_kernels.decoder_layer(
                        hidden, weights, *rest[:2], *caches, rest[4], eps=1e-5, **chain
                    )
                )
        assert outs[0].isfinite().all()
        assert torch.equal(outs[1][:, : n - 2], outs[0][:, : n - 2])
        assert outs[1][:, n - 2 :].isnan().all()


@everywhere(OP)
def test_nothing_to_do(backend, device):
    weights = make_weights(MODELS["whole vectors"], torch.float32, device)
    with running(OP, backend, device):
        for lengths, n in (([], 3), ([4], 0)):
            block = make_block(weights, lengths, n, 8, device=device)
            out = cllm_kernels.decoder_layer(block[0], weights, *block[1:], eps=1e-5)
            assert out.shape == (len(lengths), n, 64)


@everywhere(OP)
def test_a_block_that_does_not_fit_names_its_row(backend, device):
    if backend == "triton":
        pytest.skip("nothing is read back: tokens beyond the cache are not stored")
    weights = make_weights(MODELS["whole vectors"], torch.float32, device)
    block = make_block(weights, [2, 6], 4, 9, device=device)
    with running(OP, backend, device), pytest.raises(ValueError, match=r"lengths\[1\] = 6 and a "):
        cllm_kernels.decoder_layer(block[0], weights, *block[1:], eps=1e-5)


def test_opcheck_and_the_list_of_tensors():
    for model in MODELS.values():
        weights = make_weights(model, torch.float32)
        again = from_plain(plain_tensors(weights), weights.head_size)
        assert again.addresses == weights.addresses and again.ranks == weights.ranks
    block = make_block(weights, [5, 2], 3, 16)
    torch.library.opcheck(
        torch.ops.cllm_kernels.decoder_layer.default,
        (block[0], plain_tensors(weights), weights.head_size, *block[1:], 0.25, 1e-5, 4, 1, 2, 0),
    )


@everywhere(OP)
def test_autocast_changes_nothing(backend, device):
    weights = make_weights(MODELS["rests everywhere"], torch.float32, device)
    block = make_block(weights, [5, 0], 3, 16, device=device)
    outs = []
    with running(OP, backend, device):
        for enabled in (False, True):
            caches = [cache.clone() for cache in block[3:5]]
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                outs.append(
                    cllm_kernels.decoder_layer(
                        block[0], weights, *block[1:3], *caches, block[5], eps=1e-5
                    )
                )
    assert torch.equal(*outs)
