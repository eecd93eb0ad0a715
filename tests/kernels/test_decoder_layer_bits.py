"""On a GPU, in 16 bits: a token's result is the same in every block that it comes in."""

from __future__ import annotations

import pytest
import torch

import cllm_kernels
from cllm_kernels.decoder_layer import OP
from tests.kernels.backends import running
from tests.kernels.test_decoder_layer import make_block, make_weights

MODELS = {
    "SmolLM2-135M's sizes": (576, 1536, 9, 3, 64, False, False, 24),
    "norms and biases": (256, 512, 4, 2, 32, True, True, 16),
    "heads that are turned alone": (160, 208, 4, 1, 40, False, False, 8),
    "large tiles": (2048, 4608, 16, 16, 128, False, False, 0),
}
LENGTHS = (0, 3, 600, 1100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 500, 530])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_blocks_of_any_length(model, dtype, window):
    n, weights = 16, make_weights(model, dtype, "cuda")
    hidden, cos, sin, keys, values, lengths = make_block(weights, LENGTHS, n, 1200, device="cuda")

    def run(first, last, rows=slice(None), verify=None):
        """Tokens first .. last of some rows, behind those before them."""
        block = [t[rows, first:last].contiguous() for t in (hidden, cos, sin)]
        caches = (keys, values) if verify is None else (keys.clone(), values.clone())
        options = {"eps": 1e-5, "window": window, "gated_from": last - first}
        if verify is not None:
            block = [torch.cat([t, t], dim=1) for t in block]
            options |= {"guesses_from": verify, "gated_from": verify}
        return cllm_kernels.decoder_layer(
            block[0],
            weights,
            *block[1:],
            *(cache[rows] for cache in caches),
            (lengths + first)[rows],
            **options,
        )

    with running(OP, "triton", "cuda"):
        whole = run(0, n)
        for size in (1, 3, 8):
            for first in range(0, n, size):
                last = min(n, first + size)
                assert torch.equal(run(first, last), whole[:, first:last])
        for row in range(len(LENGTHS)):
            assert torch.equal(run(0, n, slice(row, row + 1)), whole[row : row + 1])
        # beside guess rows, which an adapter changes
        assert torch.equal(run(0, 6, verify=6)[:, :6], whole[:, :6])
