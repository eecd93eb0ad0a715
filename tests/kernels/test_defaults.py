"""Kernels do not care what dtype and device new tensors have by default."""

from __future__ import annotations

import contextlib

import pytest
import torch

import cllm_kernels


def calls(dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    hidden, weight = normal(70, 24), normal(130, 24)
    rows = torch.arange(70, device="cpu")
    q, k, v = normal(1, 2, 3, 16), normal(1, 1, 3, 16), normal(1, 1, 3, 16)
    caches = [torch.zeros(1, 1, 32, 16, dtype=dtype, device="cpu") for _ in range(2)]
    lengths = torch.tensor([4], device="cpu")

    def loss(recompute):
        leaves = [t.clone().requires_grad_() for t in (hidden, hidden, weight)]
        total = cllm_kernels.linear_consistency_loss(
            *leaves, labels=rows, ar_weight=2.0, recompute=recompute
        )[0]
        total.backward()
        return total.detach(), *(leaf.grad for leaf in leaves)

    return {
        "row_argmax": lambda: cllm_kernels.row_argmax(hidden),
        "linear_argmax": lambda: cllm_kernels.linear_argmax(hidden, weight),
        "sampled": lambda: cllm_kernels.linear_argmax(hidden, weight, noise=(1, rows, rows)),
        "across": lambda: cllm_kernels.linear_argmax(hidden, weight.t().contiguous().t()),
        "gumbel_noise": lambda: cllm_kernels.gumbel_noise(1, rows, rows, 40),
        "block_linear": lambda: cllm_kernels.block_linear(hidden, weight),
        "rms_norm": lambda: cllm_kernels.rms_norm(hidden, weight[0], eps=1e-5),
        "block_attention": lambda: cllm_kernels.block_attention(q, k, v, *caches, lengths),
        "loss": lambda: loss(False),
        "loss, recomputed": lambda: loss(True),
    }


@contextlib.contextmanager
def defaults(dtype, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", calls(torch.float32))
def test_results_are_the_same(name, dtype):
    call = calls(dtype)[name]
    expected = call()
    for default, device in (
        (torch.bfloat16, "cpu"),
        (torch.float64, "cpu"),
        (torch.float32, "meta"),
    ):
        with defaults(default, device):
            found = call()
        for one, other in zip(_flat(found), _flat(expected), strict=True):
            assert one.device.type == "cpu" and one.dtype == other.dtype
            assert torch.equal(one, other)


def _flat(found):
    return found if isinstance(found, tuple) else (found,)
