from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

import cllm_kernels
from cllm_kernels.block_linear import OP
from tests.kernels.backends import everywhere, running, slow_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, width, columns, rank): one of each, whole vectors and rests, several groups and tiles
SHAPES = [(1, 1, 1, 1), (2, 33, 7, 3), (5, 64, 60, 32), (7, 100, 61, 8), (13, 576, 192, 24)]
SHAPES += [(37, 40, 250, 5), (6, 1536, 64, 40), (64, 1040, 48, 8)]
NAN, INF = float("nan"), float("inf")


def make(rows, width, columns, rank, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    return {
        "x": random(rows, width),
        "weight": random(columns, width),
        "bias": random(columns),
        "low_rank": (random(rank, width, scale=width**-0.5), random(columns, rank)),
    }


def exact(x, weight, bias, low_rank=None, gated_from=0):
    """In fp64, on the CPU."""
    x, weight, bias = (tensor.cpu().double() for tensor in (x, weight, bias))
    out = linear(x, weight, bias)
    if low_rank is not None:
        a, b = (tensor.cpu().double() for tensor in low_rank)
        out[..., gated_from:, :] += linear(linear(x[..., gated_from:, :], a), b)
    return out


def check(found, wanted, terms):
    """Within the rounding of fp32 sums of so many terms, and of the dtype, of the exact result."""
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[found.dtype]
    size = wanted.abs().max()
    # the product with `a` may be rounded to the dtype before it meets `b`
    bound = size * (2 * rounding + terms * 2.0**-23)
    assert (found.cpu().double() - wanted).abs().max() <= bound


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(backend, device, shape, dtype):
    if slow_interpreter(backend, device) and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 tl.dot wrongly")
    rows, width, _, rank = shape
    given = make(*shape, dtype, device)
    low_rank = given.pop("low_rank")
    with running(OP, backend, device):
        for _ in range(2):  # a device's first call takes another way than those after it
            check(cllm_kernels.block_linear(**given), exact(**given), width)
            term = {"low_rank": low_rank, "gated_from": rows // 2}
            found = cllm_kernels.block_linear(**given, **term)
            check(found, exact(**given, **term), width + rank)
        plain = cllm_kernels.block_linear(given["x"], given["weight"])
        zero = torch.zeros_like(given["bias"])
        check(plain, exact(given["x"], given["weight"], zero), width)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_rows_bits_are_its_own(dtype, data):
    """Beside other rows, in other places, by other threads, with terms that are not for it."""
    if OP.choose(torch.device("cpu"), "auto") != "cpp":
        pytest.skip("no C++ kernels")
    rows = data.draw(st.integers(1, 40), "rows")
    # rows of x that L1 holds, that it does not, and a weight of which L2 holds few rows
    widths = st.integers(1, 200) | st.integers(900, 1100) | st.integers(2740, 2780)
    width = data.draw(widths, "width")
    columns = data.draw(st.integers(1, 150), "columns")
    rank = data.draw(st.sampled_from([1, 8, 24, 31, 33]), "rank")
    given = make(rows, width, columns, rank, dtype, seed=rows + width)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    whole = cllm_kernels.block_linear(x, weight, bias)
    first = data.draw(st.integers(0, rows - 1), "first")
    last = data.draw(st.integers(first + 1, rows), "last")
    assert torch.equal(whole[first:last], cllm_kernels.block_linear(x[first:last], weight, bias))
    gated = cllm_kernels.block_linear(x, weight, bias, low_rank=given["low_rank"], gated_from=first)
    assert torch.equal(gated[:first], whole[:first])
    alone = cllm_kernels.block_linear(x[last - 1 :], weight, bias, low_rank=given["low_rank"])
    assert torch.equal(gated[last - 1 :], alone)
    # several blocks of those rows, so that a tile has rows of any kind
    batch = data.draw(st.integers(2, 4), "batch")
    many = cllm_kernels.block_linear(
        x.repeat(batch, 1, 1), weight, bias, low_rank=given["low_rank"], gated_from=first
    )
    assert all(torch.equal(block, gated) for block in many)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 4), "threads"))
        assert torch.equal(whole, cllm_kernels.block_linear(x, weight, bias))
    finally:
        torch.set_num_threads(threads)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 40, 300, 1), (3, 65, 8200, 1)])
def test_a_weight_that_lies_across(backend, device, shape, dtype):
    if slow_interpreter(backend, device):
        pytest.skip("Triton makes it contiguous, which other tests see")
    rows, width, columns, _ = shape
    given = make(*shape, dtype, device)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    wide = torch.zeros(width, columns + 3, device=device, dtype=dtype)
    wide[:, 1 : columns + 1] = weight.t()
    with running(OP, backend, device):
        for across in (weight.t().contiguous().t(), wide[:, 1 : columns + 1].t()):
            for _ in range(2):  # a device's first call takes another way than those after it
                check(cllm_kernels.block_linear(x, across, bias), exact(x, weight, bias), width)
            plain = cllm_kernels.block_linear(x.view(1, rows, width), across)
            check(plain[0], exact(x, weight, torch.zeros_like(bias)), width)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_rows_bits_are_its_own_where_the_weight_lies_across(dtype, data):
    if OP.choose(torch.device("cpu"), "auto") != "cpp":
        pytest.skip("no C++ kernels")
    rows = data.draw(st.integers(1, 140), "rows")
    width, columns = (data.draw(st.integers(2, 150), name) for name in ("width", "columns"))
    given = make(rows, width, columns, 1, dtype, seed=rows + width)
    x, bias = given["x"], given["bias"]
    weight = given["weight"].t().contiguous().t()
    whole = cllm_kernels.block_linear(x, weight, bias)
    first = data.draw(st.integers(0, rows - 1), "first")
    last = data.draw(st.integers(first + 1, rows), "last")
    assert torch.equal(whole[first:last], cllm_kernels.block_linear(x[first:last], weight, bias))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 4), "threads"))
        assert torch.equal(whole, cllm_kernels.block_linear(x, weight, bias))
    finally:
        torch.set_num_threads(threads)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_share_a_gate(backend, device, dtype):
    given = make(12, 40, 30, 4, dtype, device)
    x = given["x"].view(3, 4, 40)
    term = {"low_rank": given["low_rank"], "gated_from": 3}
    with running(OP, backend, device):
        found = cllm_kernels.block_linear(x, given["weight"], given["bias"], **term)
        assert found.shape == (3, 4, 30)
        check(found, exact(x, given["weight"], given["bias"], **term), 44)
        row = cllm_kernels.block_linear(x[0, 0], given["weight"], given["bias"])
        assert row.shape == (30,)
        check(row, exact(x[0, 0], given["weight"], given["bias"]), 40)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_arguments(backend, device, dtype):
    given = make(6, 50, 20, 4, dtype, device)
    wide = torch.zeros(20, 64, device=device, dtype=dtype)
    wide[:, 3:53] = given["weight"]
    x = given["x"].t().contiguous().t()
    a, b = given["low_rank"]
    term = {"low_rank": (a.t().contiguous().t(), b.t().contiguous().t()), "gated_from": 2}
    bias = given["bias"].repeat_interleave(2)[::2]
    with running(OP, backend, device):
        wanted = exact(given["x"], given["weight"], given["bias"], (a, b), 2)
        for weight in (wide[:, 3:53], given["weight"].t().contiguous().t()):
            check(cllm_kernels.block_linear(x, weight, bias, **term), wanted, 54)
        spread = torch.stack([given["x"], given["x"]], 1)[:, 0]
        check(cllm_kernels.block_linear(spread, given["weight"], bias, **term), wanted, 54)


@everywhere(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_expanded_arguments(backend, device, dtype):
    """One row that stands for all, one number that stands for a whole bias."""
    given = make(5, 64, 24, 4, dtype, device)
    x, row, number = given["x"], given["weight"][:1], given["bias"][:1]
    a, b = given["low_rank"]
    term = {"low_rank": (a[:1].expand(4, 64), b[:1].expand(24, 4)), "gated_from": 2}
    with running(OP, backend, device):
        for weight in (row.expand(24, 64), given["weight"]):
            for bias in (number.expand(24), given["bias"].repeat_interleave(2)[::2]):
                for _ in range(2):
                    check(cllm_kernels.block_linear(x, weight, bias), exact(x, weight, bias), 64)
                found = cllm_kernels.block_linear(x, weight, bias, **term)
                check(found, exact(x, weight, bias, **term), 68)


@everywhere(OP)
def test_negated_views_are_read_as_their_values(backend, device):
    given = make(4, 64, 24, 3, torch.float16, device)
    x, weight, bias, (a, b) = given.values()
    with running(OP, backend, device):
        for index in range(5):
            tensors = [x, weight, bias, a, b]
            tensors[index] = torch._neg_view(tensors[index])
            x1, weight1, bias1, *pair = tensors
            wanted = exact(x1, weight1, bias1, pair)
            for _ in range(2):
                found = cllm_kernels.block_linear(x1, weight1, bias1, low_rank=tuple(pair))
                check(found, wanted, 67)


@everywhere(OP)
def test_what_is_not_finite_stays_in_its_row(backend, device):
    given = make(6, 40, 30, 4, torch.float32, device)
    clean = given["x"].clone()
    given["x"][1, 3] = NAN
    given["x"][4, 0] = INF
    with running(OP, backend, device):
        term = {"low_rank": given["low_rank"], "gated_from": 4}
        found = cllm_kernels.block_linear(given["x"], given["weight"], given["bias"], **term)
        wanted = cllm_kernels.block_linear(clean, given["weight"], given["bias"], **term)
    for row in (0, 2, 3, 5):
        assert torch.equal(found[row], wanted[row])
    assert found[1].isnan().all()
    assert not found[4].isfinite().any()


@everywhere(OP)
def test_nothing_to_do(backend, device):
    with running(OP, backend, device):
        for shape in ((0, 5), (3, 0, 5), (0, 2, 5)):
            x = torch.zeros(shape, device=device)
            found = cllm_kernels.block_linear(x, torch.ones(4, 5, device=device))
            assert found.shape == (*shape[:-1], 4)
        assert cllm_kernels.block_linear(
            torch.ones(2, 5, device=device), torch.ones(0, 5, device=device)
        ).shape == (2, 0)
        x, weight, bias = torch.ones(2, 3, 0), torch.ones(4, 0), torch.randn(4)
        x, weight, bias = (tensor.to(device) for tensor in (x, weight, bias))
        term = {"low_rank": (torch.ones(2, 0, device=device), torch.ones(4, 2, device=device))}
        assert torch.equal(cllm_kernels.block_linear(x, weight), torch.zeros(2, 3, 4).to(device))
        for given in ({}, term):
            found = cllm_kernels.block_linear(x, weight, bias, **given)
            assert torch.equal(found, bias.expand(2, 3, 4))


def test_gradients_are_torchs():
    given = make(4, 6, 5, 2, torch.float32)
    tensors = [given["x"], given["weight"], given["bias"], *given["low_rank"]]
    tensors = [tensor.double().float().requires_grad_() for tensor in tensors]
    x, weight, bias, a, b = tensors
    cllm_kernels.block_linear(
        x, weight, bias, low_rank=(a, b), gated_from=1
    ).square().sum().backward()
    copies = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y, other, shift, c, d = copies
    out = linear(y, other, shift)
    out = torch.cat([out[:1], out[1:] + linear(linear(y[1:], c), d)])
    out.square().sum().backward()
    for tensor, copy in zip(tensors, copies, strict=True):
        torch.testing.assert_close(tensor.grad, copy.grad)
    with torch.no_grad():
        assert not cllm_kernels.block_linear(x, weight, bias).requires_grad


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(backend, device, dtype):
    if slow_interpreter(backend, device) and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 tl.dot wrongly")
    given = make(4, 64, 5, 2, dtype, device) | {"gated_from": 1}
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    with running(OP, backend, device):
        for _ in range(2):
            wanted = cllm_kernels.block_linear(**given)
            with torch.autocast(device, other):
                assert torch.equal(cllm_kernels.block_linear(**given), wanted)
        given["x"].requires_grad_()  # torch's own product, which autocast would change
        with torch.autocast(device, other):
            assert cllm_kernels.block_linear(**given).dtype is dtype


def test_opcheck():
    given = make(4, 6, 5, 2, torch.float32)
    op = torch.ops.cllm_kernels.block_linear.default
    x, weight, bias = given["x"], given["weight"], given["bias"]
    torch.library.opcheck(op, (x, weight, bias, *given["low_rank"], 2))
    torch.library.opcheck(op, (x.bfloat16(), weight.bfloat16(), None, None, None, 0))


def test_compiled_without_a_graph_break():
    given = make(4, 6, 5, 2, torch.float32)

    def twice(x, weight, bias, low_rank):
        out = cllm_kernels.block_linear(x, weight, bias, low_rank=low_rank, gated_from=1)
        return out + cllm_kernels.block_linear(x, weight)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), twice(**given))
    given["x"].requires_grad_()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(compiled(**given), twice(**given))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., H\], not \[\]"),
        ({"weight": torch.zeros(5, 7)}, ValueError, r"weight must be \[N, 6\] to fit x \[4, 6\]"),
        ({"weight": torch.zeros(6)}, ValueError, r"weight must be \[N, 6\]"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\], one entry per row"),
        ({"bias": torch.zeros(5).double()}, TypeError, "bias is float64 but x is float32"),
        ({"weight": torch.zeros(5, 6).half()}, TypeError, "weight is float16 but x is float32"),
        ({"x": torch.zeros(4, 6).double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"weight": torch.zeros(5, 6, device="meta")}, ValueError, "weight is on meta"),
        ({"gated_from": 5}, ValueError, r"gated_from must be a row of x \[4, 6\], not 5"),
        ({"gated_from": -1}, ValueError, "gated_from must be a row of x"),
        ({"low_rank": (torch.zeros(2, 6), None)}, ValueError, "not half of it"),
        ({"low_rank": (None, torch.zeros(5, 2))}, ValueError, "not half of it"),
        (
            {"low_rank": (torch.zeros(2, 6), torch.zeros(5, 3))},
            ValueError,
            r"low_rank must be a \[R, 6\] and b \[5, R\], not \[2, 6\] and \[5, 3\]",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    given = make(4, 6, 5, 2, torch.float32) | {"gated_from": 1}
    cllm_kernels.block_linear(**given)  # from now on there is a direct call, too
    given |= changes
    for _ in range(2):
        with pytest.raises(error, match=message):
            cllm_kernels.block_linear(**given)
