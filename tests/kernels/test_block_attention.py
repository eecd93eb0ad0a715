from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cllm_kernels
from cllm_kernels._backend import _triton_reason
from cllm_kernels.block_attention import OP
from tests.kernels.backends import everywhere, running, slow_interpreter
from tests.one_thread import one_thread

__all__ = ["one_thread"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def make(
    *,
    lengths=(0, 7, 40),
    heads=4,
    kv_heads=2,
    n=5,
    width=64,
    capacity=64,
    dtype=torch.float32,
    device="cpu",
    strided=True,
    seed=0,
):
    """Operands whose caches hold NaN wherever no token has been written."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)

    def block(count):
        shape = (batch, n, count, width) if strided else (batch, count, n, width)
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        return tensor.transpose(1, 2) if strided else tensor

    def cache():
        shape = (
            (batch, capacity, kv_heads, width) if strided else (batch, kv_heads, capacity, width)
        )
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        tensor = tensor.transpose(1, 2) if strided else tensor
        for row, length in enumerate(lengths):
            tensor[row, :, length:] = NAN
        return tensor

    state = [block(heads), block(kv_heads), block(kv_heads), cache(), cache()]
    return [*state, torch.tensor(lengths, device=device)]


def visible_mask(length, n, window, device):
    slot = torch.arange(length + n, device=device)
    query = (length + torch.arange(n, device=device))[:, None]
    mask = slot <= query
    return mask if window is None else mask & (slot > query - window)


def formula(q, keys, values, mask, scale, softcap):
    """One row in q's dtype: what plain torch makes of it. [Hq, n, D]."""
    groups = q.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    if softcap is None and q.dtype is not torch.float64:
        return scaled_dot_product_attention(
            q[None], keys[None], values[None], attn_mask=mask, scale=scale
        )[0]
    scores = q @ keys.transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights @ values


def check(operands, *, scale=None, window=None, softcap=None, run=None):
    """Output against fp64, row by row from the tokens alone; caches bit for bit."""
    q, k_new, v_new, k_cache, v_cache, lengths = operands
    n = q.shape[2]
    wanted_caches = []
    for cache, new in ((k_cache, k_new), (v_cache, v_new)):
        wanted = cache.clone()
        for row, length in enumerate(lengths.tolist()):
            wanted[row, :, length : length + n] = new[row]
        wanted_caches.append(wanted)
    before = lengths.clone()
    options = {"scale": scale, "window": window, "softcap": softcap}
    out = (run or cllm_kernels.block_attention)(*operands, **options)
    assert out.shape == q.shape and out.dtype is q.dtype and torch.equal(lengths, before)
    assert out.transpose(1, 2).is_contiguous()
    bits = torch.int32 if q.dtype is torch.float32 else torch.int16
    for cache, wanted in zip((k_cache, v_cache), wanted_caches, strict=True):
        assert torch.equal(cache.view(bits), wanted.view(bits))

    factor = q.shape[3] ** -0.5 if scale is None else scale
    ours = theirs = largest = 0.0
    for row, length in enumerate(lengths.tolist()):
        tokens = [q[row], *(wanted[row, :, : length + n] for wanted in wanted_caches)]
        mask = visible_mask(length, n, window, q.device)
        exact = formula(*(tensor.double() for tensor in tokens), mask, factor, softcap)
        plain = formula(*tokens, mask, factor, softcap)
        ours = max(ours, (out[row].double() - exact).abs().max().item())
        theirs = max(theirs, (plain.double() - exact).abs().max().item())
        largest = max(largest, exact.abs().max().item())
        assert bool(out[row].isfinite().all())
    # twice what torch makes in this dtype, and one rounding of the result
    assert ours <= 2 * theirs + torch.finfo(q.dtype).eps * largest, (ours, theirs)
    return out


def skip_what_the_interpreter_gets_wrong(backend, device, dtype):
    if slow_interpreter(backend, device) and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 tl.dot wrongly")


OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"window": 6}, id="window"),
    pytest.param({"softcap": 3.0}, id="softcap"),
    pytest.param({"window": 9, "softcap": 2.0, "scale": 0.3}, id="all"),
]


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [1, 5, 16, 33])
def test_ragged_rows(backend, device, dtype, options, n):
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    lengths = (0, 37) if slow_interpreter(backend, device) else (0, 7, 64, 31)
    with running(OP, backend, device):
        check(make(lengths=lengths, n=n, capacity=101, dtype=dtype, device=device), **options)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 64, 80, 96, 128, 256])
def test_head_sizes(backend, device, dtype, width):
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    with running(OP, backend, device):
        operands = make(width=width, lengths=(3, 50), capacity=80, dtype=dtype, device=device)
        check(operands, softcap=5.0)
        check(make(width=width, lengths=(17,), n=16, dtype=dtype, device=device), window=12)


@everywhere(OP)
@pytest.mark.parametrize("groups", [1, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 5, 128])
def test_grouped_heads_and_wide_blocks(backend, device, groups, n):
    if slow_interpreter(backend, device) and n == 128:
        n = 136 // groups
    with running(OP, backend, device):
        operands = make(
            heads=2 * groups, n=n, lengths=(0, 61), capacity=200, device=device, dtype=torch.float16
        )
        check(operands)


@everywhere(OP)
def test_caches_of_any_stride(backend, device):
    with running(OP, backend, device):
        wanted = check(make(device=device, strided=False))
        # a slice of a larger store, every second slot, NaN all around
        operands = make(device=device, strided=False)
        for place in (3, 4):
            batch, heads, capacity, width = operands[place].shape
            store = torch.full((batch, heads + 1, 2 * capacity + 3, width + 8), NAN, device=device)
            view = store[:, 1:, 3::2, 8:][:, :, :capacity]
            view.copy_(operands[place])
            operands[place] = view
            untouched = store.clone()
            operands.append((store, untouched, view))
        stores = [operands.pop(), operands.pop()]
        assert torch.equal(check(operands), wanted)
        for store, untouched, view in stores:
            untouched[:, 1:, 3::2, 8:][:, :, : view.shape[2]] = view
            assert torch.equal(store.view(torch.int32), untouched.view(torch.int32))
        # queries and new tokens whose last dimension is not contiguous
        operands = make(device=device, strided=False)
        for place in range(3):
            operands[place] = operands[place].transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(check(operands), wanted)


@everywhere(OP)
@pytest.mark.parametrize("options", OPTIONS)
def test_long_caches(backend, device, options):
    """Past one block of the sums, with whole blocks before a window and behind short rows."""
    short = slow_interpreter(backend, device)
    lengths = (3, 290) if short else (3, 511, 1490, 2040)
    with running(OP, backend, device):
        operands = make(lengths=lengths, n=8, capacity=320 if short else 2050, device=device)
        check(operands, **options)
        if "window" in options:
            operands = make(lengths=lengths, n=8, capacity=320 if short else 2050, device=device)
            check(operands, **(options | {"window": 600}))


@everywhere(OP)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("split_slots", [1, 64, 128, 1000])
def test_splits_of_every_count(backend, device, options, split_slots):
    if backend != "triton":
        pytest.skip("only the Triton kernel splits a cache")
    from cllm_kernels.block_attention.triton_kernel import block_attention

    def run(*operands, scale, window, softcap):
        scale = scale or operands[0].shape[3] ** -0.5
        return block_attention(*operands, scale, window, softcap, None, split_slots=split_slots)

    with running(OP, backend, device):
        operands = make(lengths=(0, 63, 64, 131), n=6, capacity=256, device=device)
        check(operands, run=run, **options)


@pytest.mark.parametrize("window", [None, 1, 449, 500, 511, 512, 530, 5000])
@pytest.mark.parametrize("slots", [64, 520, 2048, 1 << 17])
def test_where_a_cache_is_cut_does_not_hang_on_the_block(window, slots):
    if reason := _triton_reason():
        pytest.skip(reason)
    from cllm_kernels.block_attention.triton_sizes import cuts

    assert len({cuts(slots, window, n, None, 64) for n in range(1, 65)}) == 1
    size, splits = cuts(slots, window, 200, None, 64)
    assert size * splits >= min(slots, (window or slots) + 200)


@everywhere(OP)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_autocast_changes_nothing(backend, device, softcap):
    outs = []
    with running(OP, backend, device):
        for enabled in (False, True):
            operands = make(lengths=(0, 9), capacity=64, device=device)
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                outs.append(cllm_kernels.block_attention(*operands, softcap=softcap))
    assert outs[0].dtype == outs[1].dtype and torch.equal(*outs)


@everywhere(OP)
def test_more_slots_than_the_hint(backend, device):
    with running(OP, backend, device):
        q, *rest = make(lengths=(0, 100, 300), capacity=700, device=device)
        run = cllm_kernels.block_attention
        check([q, *rest], run=lambda *a, **k: run(*a, max_length=64, **k))


def ordered_product(left, right, dtype):
    """left @ right, every element summed in the same order."""
    out = np.zeros((left.shape[0], right.shape[1]), dtype)
    for k in range(left.shape[1]):
        out += left[:, k, None].astype(dtype) * right[None, k].astype(dtype)
    return out


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_tokens_bits_do_not_depend_on_where_its_block_began(
    backend, device, dtype, options, monkeypatch
):
    """The same text fed from different lengths, beside different rows: equal bits per position."""
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    if backend == "reference":
        pytest.skip("the definition sums over the whole cache in one product")
    if slow_interpreter(backend, device):
        # numpy's product of a row depends on which row it is; a GPU's does not
        monkeypatch.setattr(np, "matmul", ordered_product)
    n, text = 8, 75
    with running(OP, backend, device):
        found: dict[int, torch.Tensor] = {}
        heads = {"heads": 2, "kv_heads": 1, "dtype": dtype, "device": device}
        q, k, v, *_ = make(n=text, lengths=(0,), capacity=text, **heads)
        other = make(n=n, lengths=(70,), capacity=600, seed=1, **heads)
        steps = ((13, 70), (11, 5)) if backend == "triton" else ((3, 70), (7, 5), (8, 590))
        for step, neighbour in steps:
            for start in range(step - 1, text - n + 1, step):
                block = [
                    torch.cat([t[:, :, start : start + n], o])
                    for t, o in zip((q, k, v), other[:3], strict=True)
                ]
                caches = [torch.zeros(2, 1, 600, 64, dtype=dtype, device=device) for _ in "kv"]
                for cache, tokens in zip(caches, (k, v), strict=True):
                    cache[:1, :, :start] = tokens[:, :, :start]
                lengths = torch.tensor([start, neighbour], device=device)
                out = cllm_kernels.block_attention(*block, *caches, lengths, **options)
                for i in range(n):
                    known = found.setdefault(start + i, out[0, :, i].clone())
                    assert torch.equal(out[0, :, i], known), (step, start, i)


@everywhere(OP)
def test_extreme_scores_and_repeated_runs(backend, device):
    with running(OP, backend, device):
        operands = make(device=device, lengths=(0, 30))
        operands[0].mul_(1e4)
        first = check(operands)
        assert torch.equal(cllm_kernels.block_attention(*operands), first)
        assert torch.equal(
            cllm_kernels.block_attention(*operands, scale=0.0)[0, 0, 0], operands[2][0, 0, 0]
        )


@everywhere(OP)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("garbage", [NAN, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_stays_behind_the_tokens_before_it(
    backend, device, dtype, garbage, side, softcap, window
):
    """A wrong guess that overflows must not reach the right ones in front of it, nor an old token
    those that see it no more."""
    outs = []
    for bad in (False, True):
        q, k_new, v_new, k_cache, v_cache, lengths = make(dtype=dtype, device=device)
        if bad:
            new, cache = (k_new, k_cache) if side == "keys" else (v_new, v_cache)
            new[:, :, 3:] = garbage
            if window is not None:
                cache[2, :, 40 - window + 1] = garbage  # the first token alone sees it
        with running(OP, backend, device):
            out = cllm_kernels.block_attention(
                q, k_new, v_new, k_cache, v_cache, lengths, softcap=softcap, window=window
            )
        outs.append(out)
    assert outs[0].isfinite().all()
    seen = torch.ones(3, 3, dtype=torch.bool, device=device)
    seen[2, 0] = window is None
    found, wanted = (out[:, :, :3].transpose(1, 2)[seen] for out in (outs[1], outs[0]))
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    assert not outs[1][:, :, 3:].isfinite().all()


@everywhere(OP)
@pytest.mark.parametrize("garbage", [NAN, float("inf"), 3e38, -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_query_sees_never_reaches_the_output(backend, device, garbage, dtype):
    """Stale slots, and slots that have left the window."""
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    with running(OP, backend, device):
        operands = make(lengths=(20, 5), dtype=dtype, device=device)
        clean = [tensor.clone() for tensor in operands]
        for place in (3, 4):
            for row, length in enumerate((20, 5)):
                operands[place][row, :, length:] = garbage
                operands[place][row, :, : max(length - 5, 0)] = garbage
                clean[place][row, :, length:] = 0.0
        out = cllm_kernels.block_attention(*operands, window=6)
        assert torch.equal(out, cllm_kernels.block_attention(*clean, window=6))
        assert bool(out.isfinite().all())


@everywhere(OP)
def test_empty_inputs(backend, device):
    with running(OP, backend, device):
        for batch, heads, n in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
            q = torch.zeros(batch, heads, n, 64, device=device)
            new = torch.zeros(batch, 2, n, 64, device=device)
            cache = torch.zeros(batch, 2, 9, 64, device=device)
            lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            out = cllm_kernels.block_attention(q, new, new, cache, cache.clone(), lengths)
            assert out.shape == q.shape


@pytest.mark.slow
@everywhere(OP)
def test_offsets_beyond_32_bits(backend, device, tmp_path):
    """Rows, heads and slots whose offsets pass 2^31 elements, in a sparse file."""
    if device != "cpu":
        pytest.skip("needs the memory it addresses")
    # Slot 32 begins beyond 2^31, and so does row 1; no two tokens overlap.
    strides = (2**31 + 2**21, 2**30 + 2**20, 2**26 + 2**12, 1)
    size = 40 * strides[2] + strides[1] + strides[0]
    path = str(tmp_path / "caches")
    store = torch.from_file(path, shared=True, size=2 * size, dtype=torch.float16)
    with running(OP, backend, device):
        small = make(lengths=(34, 3), n=5, capacity=40, dtype=torch.float16)
        large = [tensor.clone() for tensor in small]
        for place, offset in ((3, 0), (4, size)):
            large[place] = store.as_strided(small[place].shape, strides, offset)
            large[place].copy_(small[place])
        assert torch.equal(check(large), check(small))


@everywhere(OP)
@pytest.mark.parametrize("lengths", [(0, 60), (-1, 3)])
def test_rows_that_do_not_fit(backend, device, lengths):
    with running(OP, backend, device):
        operands = make(lengths=(0, 0), device=device)
        operands[5] = torch.tensor(lengths, device=device)
        kept = [operands[3].clone(), operands[4].clone()]
        if device == "cpu":
            row = 1 if lengths[1] == 60 else 0
            with pytest.raises(ValueError, match=rf"lengths\[{row}\] = {lengths[row]} and a block"):
                cllm_kernels.block_attention(*operands)
        else:  # clamped: what lies beyond the cache is not stored, nothing else is touched
            cllm_kernels.block_attention(*operands)
            for cache, old in zip(operands[3:5], kept, strict=True):
                for row, length in enumerate(lengths):
                    begin = max(length, 0)
                    old[row, :, begin : begin + 5] = cache[row, :, begin : begin + 5]
                assert torch.equal(cache.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_lengths_beyond_the_cache_are_clamped_where_they_cannot_be_read(backend):
    """What a GPU does, seen without one: the backends below the check of the CPU."""
    from importlib import import_module

    name = "reference" if backend == "reference" else "triton_kernel"
    if reason := OP.unavailable(backend, torch.device("cpu")):
        pytest.skip(reason)
    attend = import_module(f"cllm_kernels.block_attention.{name}").block_attention
    operands = make(lengths=(0, 0, 0), capacity=16, n=5)
    for place in (3, 4):
        operands[place].copy_(torch.randn(operands[place].shape))
    q, k_new, v_new, k_cache, v_cache, _ = operands
    before = k_cache.clone()
    lengths = torch.tensor([13, 500, -7])
    out = attend(q, k_new, v_new, k_cache, v_cache, lengths, 0.125, None, None, None)
    assert bool(out.isfinite().all())
    assert torch.equal(k_cache[0, :, 13:], k_new[0, :, :3])
    assert torch.equal(k_cache[0, :, :13], before[0, :, :13])
    assert torch.equal(k_cache[1], before[1])
    assert torch.equal(k_cache[2, :, :5], k_new[2]) and torch.equal(
        k_cache[2, :, 5:], before[2, :, 5:]
    )
    wide = [torch.cat([c, c], dim=2) for c in (before, v_cache)]
    wanted = attend(q, k_new, v_new, *wide, torch.tensor([13, 16, 0]), 0.125, None, None, None)
    torch.testing.assert_close(out[:2], wanted[:2], rtol=1e-5, atol=1e-5)
