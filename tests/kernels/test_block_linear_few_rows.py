"""What block_linear's GPU kernel does for decoder_layer: several layers, and their last steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, silu

from cllm_kernels.block_linear import OP
from tests.kernels.backends import everywhere, running, slow_interpreter

DTYPES = [torch.float16, torch.bfloat16]
# width, columns of up to three layers: whole tiles and rests
SHAPES = [(64, (64, 32, 32)), (576, (576, 200, 192)), (144, (40, 8, 120)), (1296, (96, 33, 64))]


def kernel(backend, device, dtype):
    if backend != "triton":
        pytest.skip("of the Triton kernel")
    if slow_interpreter(backend, device) and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 tl.dot wrongly")
    from cllm_kernels.block_linear import triton_kernel

    return triton_kernel


def tensors(device, dtype, rows, width, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    weights = [random(size, width) * width**-0.5 for size in columns]
    return random(1, rows, width), weights, [random(size) for size in columns]


def near(found, wanted, roundings):
    step = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[found.dtype]
    bound = wanted.abs() * roundings * step + 2e-5 * wanted.abs().max()
    assert ((found.cpu().double() - wanted).abs() <= bound).all()


def exact(x, weight, bias):
    return linear(x.cpu().double(), weight.cpu().double(), bias.cpu().double())


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_several_layers(backend, device, dtype, rows, shape):
    module = kernel(backend, device, dtype)
    width, columns = shape
    x, weights, biases = tensors(device, dtype, rows, width, columns)
    with running(OP, backend, device):
        for count in (1, 2, 3):
            given = weights[:count], biases[:count]
            assert module.takes(x, weights[:count])
            for out, weight, bias in zip(module.few_rows(x, *given), *given, strict=True):
                near(out, exact(x, weight, bias), 1)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_last_steps(backend, device, dtype, rows, shape):
    module = kernel(backend, device, dtype)
    width, (columns, *_) = shape
    x, weights, biases = tensors(device, dtype, rows, width, (columns, columns))
    add = torch.randn(1, rows, columns, dtype=dtype, device=device)
    with running(OP, backend, device):
        alone = module.few_rows(x, weights, biases)
        (found,) = module.few_rows(x, weights, biases, swiglu=True)
        # the steps between are rounded as torch's modules round them
        wanted = silu(alone[0].cpu().double()).to(dtype).double() * alone[1].cpu().double()
        near(found, wanted, 2.5)
        (found,) = module.few_rows(x, weights[:1], biases[:1], add=add)
        assert torch.equal(found, add + alone[0])


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 1, 64), (2, 2, 32), (4, 1, 128)])
def test_turned_heads(backend, device, dtype, heads, kv_heads, size):
    module = kernel(backend, device, dtype)
    columns = (heads * size, kv_heads * size, kv_heads * size)
    x, weights, biases = tensors(device, dtype, 10, 96, columns)
    x = x.view(2, 5, 96)
    assert module.turns(10, sum(columns), 96, size)
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 2):
        angles = [torch.randn(batch, 5, size, generator=generator) for _ in range(2)]
        cos, sin = (angle.to(device, dtype) for angle in angles)
        with running(OP, backend, device):
            plain = module.few_rows(x, weights, biases)
            found = module.few_rows(x, weights, biases, turn=(cos, sin))
        assert torch.equal(found[2], plain[2])
        for one, other in zip(found[:2], plain[:2], strict=True):
            states = other.unflatten(2, (-1, size)).transpose(1, 2)
            low, high = states.chunk(2, dim=-1)
            turned = torch.cat([-high, low], dim=-1)
            wanted = states * cos[:, None] + turned * sin[:, None]
            assert torch.equal(one, wanted.transpose(1, 2).flatten(2))
    assert not module.turns(10, sum(columns), 96, 40)


@everywhere(OP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_are_its_own(backend, device, dtype):
    """Beside any other rows, also where they take other tiles."""
    module = kernel(backend, device, dtype)
    if slow_interpreter(backend, device):
        pytest.skip("numpy's products, which the interpreter takes, are not so")
    x, weights, biases = tensors(device, dtype, 64, 576, (192, 64, 64))
    with running(OP, backend, device):
        whole = module.few_rows(x, weights, biases)
        for first, last in ((0, 1), (3, 5), (0, 16), (7, 40), (20, 64)):
            part = module.few_rows(x[:, first:last].contiguous(), weights, biases)
            for one, all_rows in zip(part, whole, strict=True):
                assert torch.equal(one, all_rows[:, first:last])


@everywhere(OP)
def test_what_it_leaves(backend, device):
    module = kernel(backend, device, torch.float16)
    x, weights, _ = tensors(device, torch.float16, 4, 64, (32,))
    assert module.takes(x, weights)
    assert not module.takes(x.float(), [weights[0].float()])
    assert not module.takes(x.repeat(1, 17, 1), weights)
    assert not module.takes(x[..., :40], [weights[0][:, :40].contiguous()])
    assert not module.takes(x, [weights[0].t().contiguous().t()])
    assert not module.takes(x[:, :0], weights)
