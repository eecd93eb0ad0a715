from __future__ import annotations

import pytest
import torch

import cllm_kernels
from cllm_kernels.row_argmax import OP, reference
from tests.kernels.backends import everywhere, running, slow_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def check(logits: torch.Tensor) -> None:
    """The op against torch.argmax on the CPU: same index, same element down to the sign of zero."""
    index, value = cllm_kernels.row_argmax(logits)
    assert index.dtype is torch.int64 and value.dtype is logits.dtype
    assert index.device == logits.device == value.device
    wanted_index, wanted_value = reference.row_argmax(logits.cpu())
    assert torch.equal(index.cpu(), wanted_index)
    value = value.cpu()
    assert torch.equal(value.isnan(), wanted_value.isnan())
    bits = torch.int32 if logits.dtype is torch.float32 else torch.int16
    same = value.view(bits) == wanted_value.view(bits)
    assert torch.all(same | wanted_value.isnan())


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 251, 32000, 49152])
@pytest.mark.parametrize("rows", [1, 7, 252])
def test_ragged_shapes(backend, device, rows, columns, dtype):
    if slow_interpreter(backend, device):
        rows, columns = min(rows, 5), min(columns, 6001)
    if rows * columns > 1_000_000:
        rows = 37  # large enough for every thread to get several rows
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    with running(OP, backend, device):
        check(logits.to(device, dtype))


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_take_the_lowest_index(backend, device, dtype):
    logits = torch.randint(0, 3, (9, 5000), generator=torch.Generator().manual_seed(0))
    with running(OP, backend, device):
        check(logits.to(device, dtype))
        check(torch.zeros(3, 4100, device=device, dtype=dtype))
        check(-logits.to(device, dtype) - 1)  # all negative: the order of bit patterns turns round


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_tie(backend, device, dtype):
    logits = torch.full((4, 9000), -1.0)
    logits[0, 5] = -0.0
    logits[0, 8000] = 0.0
    logits[1, 5] = 0.0
    logits[1, 8000] = -0.0
    logits[2, 8999] = -0.0
    with running(OP, backend, device):
        check(logits.to(device, dtype))


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinite_rows(backend, device, dtype):
    logits = torch.randn(8, 9001, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[0] = -INF
    logits[1, [17, 8000]] = NAN
    logits[2, 9000] = NAN
    logits[3] = NAN
    logits[4, 4000] = INF
    logits[4, 8500] = NAN
    logits[5, [70, 7000]] = INF
    logits[6] = -INF
    logits[6, 5000] = torch.finfo(dtype).min
    logits[7] = torch.finfo(dtype).max
    negative_nan = torch.full((1,), NAN).to(dtype).neg()
    logits[1, 17] = negative_nan
    with running(OP, backend, device):
        check(logits.to(device))
        check(logits[1:3].to(device))  # few rows: cut into pieces over the threads


@everywhere(OP)
def test_each_position_can_win(backend, device):
    columns = 331 if not slow_interpreter(backend, device) else 19
    with running(OP, backend, device):
        for dtype in DTYPES:
            check(torch.eye(columns, device=device, dtype=dtype))
            check(torch.eye(columns, device=device, dtype=dtype) - 5)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_leading_dimensions(backend, device, dtype):
    outer, middle = (2, 3) if slow_interpreter(backend, device) else (5, 6)
    base = torch.randn(outer, middle, 3, 260, generator=torch.Generator().manual_seed(2))
    base = base.to(device, dtype)
    with running(OP, backend, device):
        for view in (
            base,
            base[:, -2:],
            base[:, 1:3, 0],
            base[:, :, 1, 3:250],
            base[::2, ::3, ::2],  # no two strides address this: it is copied
            base.transpose(0, 1),
            base[0, 0],
            base[0, 0, 0],
            base[:, :1, 0].expand(outer, 4, 260),
            base[..., :1],
        ):
            check(view)


@everywhere(OP)
def test_no_rows(backend, device):
    with running(OP, backend, device):
        for shape in ((0, 5), (3, 0, 7)):
            index, value = cllm_kernels.row_argmax(torch.empty(shape, device=device))
            assert index.shape == value.shape == shape[:-1]


@everywhere(OP)
def test_a_parameter_gives_results_without_gradient(backend, device):
    logits = torch.nn.Parameter(torch.randn(3, 40, device=device))
    with running(OP, backend, device):
        _, value = cllm_kernels.row_argmax(logits)
    assert not value.requires_grad


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"logits must be \[\.\.\., V\] with V >= 1, not \[3, 0\]"):
        cllm_kernels.row_argmax(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="with V >= 1"):
        cllm_kernels.row_argmax(torch.tensor(1.0))
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, not int64"):
        cllm_kernels.row_argmax(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"last dimension of logits \[4, 3\] must be contiguous"):
        cllm_kernels.row_argmax(torch.zeros(3, 4).t())
