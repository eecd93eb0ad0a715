from __future__ import annotations

import pytest
import torch

import cllm_kernels
from cllm_kernels.rms_norm import OP, reference
from tests.kernels.backends import everywhere, running, slow_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
EPS = 1e-5
NAN, INF = float("nan"), float("inf")


def make(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    x, weight = (torch.randn(size, generator=generator) for size in (shape, shape[-1:]))
    return x.to(device, dtype), weight.to(device, dtype)


def check(found, x, weight, truncated=False):
    """Within the two roundings to the dtype, and those of fp32 sums, of the result in fp64."""
    assert found.dtype is x.dtype and found.shape == x.shape and found.device == x.device
    assert found.is_contiguous() and not found.requires_grad
    x, weight = x.cpu().double(), weight.cpu().double()
    wanted = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    rounding = ROUNDING[found.dtype] * (2 if truncated else 1)
    bound = wanted.abs() * (2.01 * rounding + 2.0**-20)
    # and what is too small for a normal number of the dtype
    bound += torch.finfo(found.dtype).smallest_normal * 2 * rounding * (1 + weight.abs())
    assert torch.all((found.cpu().double() - wanted).abs() <= bound)


def truncates(backend, device, dtype):
    """Triton's interpreter cuts fp32 off where a GPU rounds it to bfloat16."""
    return slow_interpreter(backend, device) and dtype is torch.bfloat16


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 1), (7, 33), (2, 5, 576), (3, 4096), (2, 5003)])
def test_against_fp64(backend, device, shape, dtype):
    x, weight = make(shape, dtype, device)
    cut = truncates(backend, device, dtype)
    with running(OP, backend, device):
        for scale in (1.0, 1e-3, 100.0):
            check(cllm_kernels.rms_norm(x * scale, weight, eps=EPS), x * scale, weight, cut)
        zero = torch.zeros_like(x)
        assert torch.equal(cllm_kernels.rms_norm(zero, weight, eps=EPS), weight * zero)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_rounds_as_huggingface_does(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = make((3, 4, 71), dtype)
    norm = LlamaRMSNorm(71, eps=EPS)
    norm.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        assert torch.equal(reference.rms_norm(x, weight, EPS), norm(x))


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [71, 576, 4096])
def test_a_rows_bits_are_its_own(backend, device, width, dtype):
    """Torch's mean, in the reference, promises it to nobody."""
    if backend == "reference":
        pytest.skip("torch's mean sums a row in an order that other rows may change")
    x, weight = make((37, width), dtype, device)
    with running(OP, backend, device):
        whole = cllm_kernels.rms_norm(x, weight, eps=EPS)
        for first, last in ((0, 1), (5, 6), (36, 37), (3, 20), (0, 36)):
            found = cllm_kernels.rms_norm(x[first:last], weight, eps=EPS)
            assert torch.equal(found, whole[first:last])
        block = cllm_kernels.rms_norm(x[:36].view(4, 9, width), weight, eps=EPS)
        assert torch.equal(block.flatten(0, 1), whole[:36])


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_arguments(backend, device, dtype):
    x, weight = make((4, 3, 100), dtype, device)
    spread = weight.repeat_interleave(2)[::2]
    cut = truncates(backend, device, dtype)
    with running(OP, backend, device):
        views = (
            *(x[:, 1:], x[::2, :, 10:60], x.transpose(0, 1), x.transpose(1, 2)),
            *(x[:1].expand(5, 3, 100), x[0, 0], torch._neg_view(x)),
        )
        for view in views:
            scale = spread[: view.shape[-1]]
            check(cllm_kernels.rms_norm(view, scale, eps=EPS), view, scale, cut)
        check(cllm_kernels.rms_norm(x, torch._neg_view(weight), eps=EPS), x, -weight, cut)


@everywhere(OP)
def test_what_is_not_finite_stays_in_its_row(backend, device):
    x, weight = make((5, 40), torch.float32, device)
    broken = x.clone()
    broken[1, 3], broken[3, 0] = NAN, INF
    with running(OP, backend, device):
        found = cllm_kernels.rms_norm(broken, weight, eps=EPS)
        wanted = cllm_kernels.rms_norm(x, weight, eps=EPS)
    for row in (0, 2, 4):
        torch.testing.assert_close(found[row], wanted[row])
    assert found[1].isnan().all()
    assert found[3, 0].isnan() and torch.all(found[3, 1:] == 0)


@everywhere(OP)
def test_no_rows(backend, device):
    with running(OP, backend, device):
        for shape in ((0, 5), (3, 0, 7)):
            x, weight = torch.empty(shape, device=device), torch.ones(shape[-1], device=device)
            assert cllm_kernels.rms_norm(x, weight, eps=EPS).shape == shape


@everywhere(OP)
def test_parameters_without_grad_mode_and_gradients_with_it(backend, device):
    x, weight = (torch.nn.Parameter(part) for part in make((3, 40), torch.float32, device))
    with running(OP, backend, device):
        with torch.no_grad():
            check(cllm_kernels.rms_norm(x, weight, eps=EPS), x, weight)
        cllm_kernels.rms_norm(x, weight, eps=EPS).square().sum().backward()
    copies = [part.detach().double().requires_grad_() for part in (x, weight)]
    torch.nn.functional.rms_norm(copies[0], (40,), copies[1], EPS).square().sum().backward()
    for part, copy in zip((x, weight), copies, strict=True):
        torch.testing.assert_close(part.grad, copy.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    op = torch.ops.cllm_kernels.rms_norm.default
    x, weight = make((2, 5, 33), dtype)
    for view in (x, x[0, 0], x[:, ::2], x.transpose(0, 1)):
        torch.library.opcheck(op, (view, weight, EPS))


def test_compiled_without_a_graph_break():
    x, weight = make((3, 40), torch.float32)

    def twice(x, weight):
        return cllm_kernels.rms_norm(cllm_kernels.rms_norm(x, weight, eps=EPS), weight, eps=0.0)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), twice(x, weight))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., H\] with H >= 1, not \[\]"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"with H >= 1, not \[3, 0\]"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must be \[6\] to fit x \[4, 6\], not"),
        ({"weight": torch.zeros(1, 6)}, ValueError, r"weight must be \[6\].*not \[1, 6\]"),
        ({"x": torch.zeros(4, 6).double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"weight": torch.zeros(6).half()}, TypeError, "weight is float16 but x is float32"),
        ({"weight": torch.zeros(6, device="meta")}, ValueError, "weight is on meta but x is on"),
        ({"eps": -1e-5}, ValueError, "eps must be finite and at least 0, not -1e-05"),
        ({"eps": NAN}, ValueError, "eps must be finite"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    given = {"x": torch.zeros(4, 6), "weight": torch.zeros(6), "eps": EPS} | changes
    with pytest.raises(error, match=f"^rms_norm: .*{message}"):
        cllm_kernels.rms_norm(given.pop("x"), given.pop("weight"), **given)
