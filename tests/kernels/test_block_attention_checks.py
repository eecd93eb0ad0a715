"""block_attention as torch sees it, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import cllm_kernels
from tests.kernels.test_block_attention import NAN, make

ops = torch.ops.cllm_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(None, None), (6, 3.0)])
def test_opcheck(dtype, options):
    operands = make(lengths=(2, 9), dtype=dtype)
    for place in (3, 4):
        operands[place] = operands[place].nan_to_num()
    torch.library.opcheck(ops.block_attention.default, (*operands, 0.125, *options, None))


def test_compiled_without_a_graph_break():
    def layer(*operands):
        return cllm_kernels.block_attention(*operands, window=9) * 2

    plain, compiled = make(), make()
    wanted = layer(*plain)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(wanted, found) and wanted.stride() == found.stride()
    assert torch.equal(plain[3].nan_to_num(), compiled[3].nan_to_num())


def test_gradients_are_refused():
    operands = make()
    operands[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient.*torch\.no_grad"):
        cllm_kernels.block_attention(*operands)
    with torch.no_grad():
        assert not cllm_kernels.block_attention(*operands).requires_grad


BLOCK, CACHE = torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 9, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 3)}, ValueError, r"q must be \[B, Hq, n, D\].*not \[2, 4, 3\]"),
        ({"q": torch.zeros(2, 4, 3, 257)}, ValueError, "D <= 256"),
        ({"q": torch.zeros(2, 3, 3, 8)}, ValueError, r"3 heads, which is not a multiple of the 2"),
        (
            {"k_new": BLOCK[:, :, :2]},
            ValueError,
            r"k_new must be \[2, 2, 3, 8\].*not \[2, 2, 2, 8\]",
        ),
        ({"v_new": BLOCK[:1]}, ValueError, r"v_new must be \[2, 2, 3, 8\]"),
        (
            {"k_cache": CACHE[..., :7]},
            ValueError,
            r"k_cache must be \[2, Hkv, C, 8\].*\[2, 2, 9, 7\]",
        ),
        ({"k_cache": CACHE[:, :, :2]}, ValueError, r"the 3 tokens of q .* do not fit the 2 slots"),
        ({"v_cache": CACHE[:, :, :8]}, ValueError, r"v_cache must be \[2, 2, 9, 8\]"),
        (
            {"v_cache": torch.zeros(2, 2, 8, 9).transpose(2, 3)},
            ValueError,
            r"the last dimension of v_cache \[2, 2, 9, 8\] must be contiguous",
        ),
        ({"lengths": torch.zeros(3).long()}, ValueError, r"lengths must be \[2\].*not \[3\]"),
        ({"lengths": torch.zeros(4).long()[::2]}, ValueError, "lengths must be contiguous"),
        ({"lengths": torch.zeros(2).int()}, TypeError, "lengths must be int64, not int32"),
        ({"lengths": torch.zeros(2, device="meta").long()}, ValueError, "lengths is on meta"),
        ({"k_new": BLOCK.half()}, TypeError, "k_new must be float32, not float16"),
        ({"q": torch.zeros(2, 4, 3, 8).double()}, TypeError, "not float64"),
        ({"v_cache": CACHE.to("meta")}, ValueError, "v_cache is on meta but q is on cpu"),
        ({"window": 0}, ValueError, "window must be at least 1 or None, not 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None"),
        ({"softcap": NAN}, ValueError, "softcap must be a positive number or None"),
        ({"scale": NAN}, ValueError, "scale must be a finite number or None, not nan"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1 or None, not 0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "q": torch.zeros(2, 4, 3, 8),
        **{"k_new": BLOCK, "v_new": BLOCK, "k_cache": CACHE, "v_cache": CACHE.clone()},
        "lengths": torch.zeros(2, dtype=torch.int64),
    } | change
    with pytest.raises(error, match=message):
        cllm_kernels.block_attention(**arguments)
