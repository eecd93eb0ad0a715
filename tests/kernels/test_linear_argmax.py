from __future__ import annotations

import pytest
import torch

import cllm_kernels
from cllm_kernels.linear_argmax import OP
from tests.kernels.backends import everywhere, running, slow_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def skip_what_the_interpreter_gets_wrong(backend, device, dtype):
    if slow_interpreter(backend, device) and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 tl.dot wrongly")


def operands(rows, vocabulary, width, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(device, dtype)
    bias = torch.randn(vocabulary, generator=generator).to(device)
    return hidden, weight, bias


def check(hidden, weight, bias=None, softcap=None):
    """The op against fp64: the winner is one (up to fp32 accumulation) and its value is right."""
    index, value = cllm_kernels.linear_argmax(hidden, weight, bias=bias, softcap=softcap)
    assert index.dtype is torch.int64 and value.dtype is torch.float32
    scores = hidden.double() @ weight.double().T
    # What fp32 may lose: one rounding for each of the terms of the largest dot product, a few eps
    # of their common size.
    bound = (hidden.double().abs() @ weight.double().abs().T).max().item() if len(hidden) else 0.0
    if bias is not None:
        scores = scores + bias.double()
        bound += bias.double().abs().max().item()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    tolerance = 8 * torch.finfo(torch.float32).eps * bound
    chosen = scores.gather(1, index[:, None])[:, 0]
    assert torch.all(scores.amax(dim=1) - chosen <= tolerance)
    assert torch.all((value.double() - chosen).abs() <= tolerance)
    return index, value


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),
    [(1, 1, 1), (1, 251, 64), (7, 251, 100), (7, 5000, 33), (252, 1021, 72), (3, 32000, 40)],
)
def test_ragged_shapes(backend, device, rows, vocabulary, width, dtype):
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    if slow_interpreter(backend, device):
        rows, vocabulary = min(rows, 37), min(vocabulary, 299)
    with running(OP, backend, device):
        hidden, weight, bias = operands(rows, vocabulary, width, dtype, device)
        check(hidden, weight)
        check(hidden, weight, bias.to(dtype))
        check(hidden, weight, bias, softcap=15.0)


def test_full_vocabulary_and_many_rows():
    hidden, weight, _ = operands(7, 49152, 96, torch.bfloat16, "cpu")
    check(hidden, weight)
    hidden, weight, _ = operands(1030, 301, 16, torch.float32, "cpu")  # more rows than one sweep
    check(hidden, weight)


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_difference_below_16_bits_still_decides(backend, device, dtype):
    """Scores that a 16-bit matmul would round to the same number: fp32 accumulation tells them."""
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    width, vocabulary = 64, 300
    hidden = torch.zeros(2, width)
    hidden[:, 0], hidden[:, 1] = 1.0, 1.0
    weight = torch.zeros(vocabulary, width)
    weight[:, 0] = 256.0
    weight[:, 1] = torch.linspace(-0.0625, 0.0625, vocabulary).to(torch.bfloat16).float()
    weight[77, 1] = 0.09375
    with running(OP, backend, device):
        index, value = cllm_kernels.linear_argmax(
            hidden.to(device, dtype), weight.to(device, dtype)
        )
        assert index.tolist() == [77, 77] and value.tolist() == [256.09375, 256.09375]
        bias = torch.zeros(vocabulary, device=device)
        bias[78] = 0.25  # now 78 wins over 77 by less than bf16 resolves at 256
        index, _ = cllm_kernels.linear_argmax(
            hidden.to(device, dtype), weight.to(device, dtype), bias=bias
        )
        assert index.tolist() == [78, 78]


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_take_the_lowest_index(backend, device, dtype):
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    vocabulary = 5000 if not slow_interpreter(backend, device) else 700
    weight = torch.zeros(vocabulary, 32)
    weight[[60, 300, vocabulary - 1]] = 1.0
    hidden = torch.ones(3, 32)
    hidden[1] = 0.0  # every token ties
    hidden[2] = -1.0  # every token but three ties
    with running(OP, backend, device):
        index, value = cllm_kernels.linear_argmax(
            hidden.to(device, dtype), weight.to(device, dtype)
        )
    assert index.tolist() == [60, 0, 0]
    assert value.tolist() == [32.0, 0.0, 0.0]


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_softcap_ties(backend, device, dtype):
    """Scores far above the cap all equal it: the lowest index wins, not the largest score."""
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    weight = torch.zeros(600, 32)
    weight[20], weight[70], weight[500] = 10.0, 30.0, 20.0
    hidden = torch.ones(2, 32)
    hidden[1] = -1.0
    with running(OP, backend, device):
        index, value = cllm_kernels.linear_argmax(
            hidden.to(device, dtype), weight.to(device, dtype), softcap=5.0
        )
    assert index.tolist() == [20, 0]
    assert value.tolist() == [5.0, 0.0]


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_and_infinite_rows(backend, device, softcap):
    hidden, weight, bias = operands(5, 300, 32, torch.float32, device)
    bias[:] = -INF
    bias[[7, 250]] = 0.0  # everything else is banned
    with running(OP, backend, device):
        index, _ = cllm_kernels.linear_argmax(hidden, weight, bias=bias, softcap=softcap)
        assert set(index.tolist()) <= {7, 250}
        index, value = cllm_kernels.linear_argmax(
            hidden, weight, bias=torch.full_like(bias, -INF), softcap=softcap
        )
        assert index.tolist() == [0] * 5
        assert value.tolist() == [-INF if softcap is None else -3.0] * 5
        hidden[1, 3] = NAN
        weight[[90, 200]] = NAN
        index, value = cllm_kernels.linear_argmax(hidden, weight, softcap=softcap)
        assert index.tolist() == [90, 0, 90, 90, 90] and torch.isnan(value).all()


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_in_16_bits(backend, device, dtype):
    skip_what_the_interpreter_gets_wrong(backend, device, dtype)
    hidden, weight, bias = operands(3, 300, 32, dtype, device)
    weight[[90, 200]] = NAN
    with running(OP, backend, device):
        for extra in (None, bias):
            index, value = cllm_kernels.linear_argmax(hidden, weight, bias=extra)
            assert index.tolist() == [90] * 3 and torch.isnan(value).all()


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
def test_float16_scores_beyond_its_range(backend, device):
    """Sums above 65504 overflow a 16-bit matmul; the value is fp32 and must not."""
    hidden = torch.full((2, 64), 100.0, device=device, dtype=torch.float16)
    weight = torch.full((200, 64), 100.0, device=device, dtype=torch.float16)
    weight[150] = 200.0
    with running(OP, backend, device):
        index, value = cllm_kernels.linear_argmax(hidden, weight)
    assert index.tolist() == [150, 150] and value.tolist() == [1280000.0] * 2


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
def test_strided_operands_and_no_rows(backend, device):
    hidden, weight, bias = operands(6, 260, 48, torch.float32, device)
    with running(OP, backend, device):
        wanted, _ = check(hidden[::2, 8:40].contiguous(), weight[:, 8:40].contiguous(), bias)
        index, _ = check(hidden[::2, 8:40], weight[:, 8:40], bias)
        assert torch.equal(index, wanted)
        index, _ = check(hidden.t().contiguous().t(), weight.t().contiguous().t(), bias)
        assert torch.equal(index, check(hidden, weight, bias)[0])
        index, value = cllm_kernels.linear_argmax(hidden[:0], weight)
        assert index.shape == value.shape == (0,)


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
def test_an_expanded_weight_and_no_width(backend, device):
    with running(OP, backend, device):
        hidden, weight, bias = operands(3, 40, 24, torch.float32, device)
        index, _ = check(hidden, weight[:1].expand(40, 24))
        assert index.tolist() == [0, 0, 0]
        index, value = cllm_kernels.linear_argmax(hidden[:, :0], weight[:, :0], bias=bias)
        assert torch.equal(index, bias.argmax().expand(3))
        assert torch.equal(value, bias.amax().expand(3))


@pytest.mark.usefixtures("both_products")
@everywhere(OP)
def test_autocast_changes_nothing(backend, device):
    with running(OP, backend, device):
        given = operands(3, 40, 24, torch.float32, device)
        wanted = check(*given)
        with torch.autocast(device, torch.bfloat16):
            found = cllm_kernels.linear_argmax(*given[:2], bias=given[2])
        assert all(map(torch.equal, found, wanted))


@everywhere(OP)
def test_negated_views_are_read_as_their_values(backend, device):
    tensors = operands(3, 40, 24, torch.float32, device)
    with running(OP, backend, device):
        for index in range(3):
            hidden, weight, bias = (
                torch._neg_view(tensor) if i == index else tensor
                for i, tensor in enumerate(tensors)
            )
            check(hidden, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_as_a_model_holds_them(dtype):
    head = torch.nn.Linear(32, 77, bias=True, dtype=dtype)
    hidden = torch.randn(4, 32, dtype=dtype, requires_grad=True)
    _, value = cllm_kernels.linear_argmax(hidden, head.weight, bias=head.bias)
    assert not value.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, ValueError, r"hidden must be \[M, H\], not \[2, 3, 4\]"),
        ({"weight": torch.zeros(5, 9)}, ValueError, r"weight must be \[V, 8\].*not \[5, 9\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "V >= 1"),
        (
            {"weight": torch.zeros(5, 8).half()},
            TypeError,
            "weight is float16 but hidden is float32",
        ),
        ({"hidden": torch.zeros(2, 8).double()}, TypeError, "not float64"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\]"),
        ({"bias": torch.zeros(5).long()}, TypeError, "bias must be float32 or float32, not int64"),
        (
            {"bias": torch.zeros(5, device="meta")},
            ValueError,
            "bias is on meta but hidden is on cpu",
        ),
        ({"weight": torch.zeros(5, 8, device="meta")}, ValueError, "weight is on meta"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None, not 0.0"),
        ({"softcap": INF}, ValueError, "softcap must be a positive number"),
        ({"softcap": NAN}, ValueError, "softcap must be a positive number"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"hidden": torch.zeros(2, 8), "weight": torch.zeros(5, 8)} | change
    with pytest.raises(error, match=message):
        cllm_kernels.linear_argmax(**arguments)
