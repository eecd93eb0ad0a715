"""Fused kernels for Jacobi decoding. Knows tensors; knows nothing of any model library.

    jacobi_step(...)      the fixed-point check: accept, commit, stop, shift the window: one launch
    draft_window(...)     the window behind such a step, with an adapter's guesses in it
    guess_window(...)     better guesses, from the text and from a pool of predictions: one launch
    guess_candidates(...) several windows for the same places, likewise: one launch
    best_candidate(...)   the one of them with most right guesses, once a forward has checked them
    guess_pool_add(...)   what a forward predicted, kept in that pool
    row_argmax(logits)    argmax over the vocabulary at the speed of memory
    linear_argmax(h, W)   argmax of h @ W.T, or a sample of its softmax; the logits never held whole
    linear_consistency_loss(s, t, W, ...)
                          divergence of two heads' outputs and cross-entropy, with gradients, the
                          logits of a few tokens at a time
    gumbel_noise(...)     noise that makes argmax a sample: a function of (seed, row, position)
    block_attention(...)  append a block to a ragged KV cache, attend to both
    decoder_layer(h, ...) a Llama-like layer over a block's few rows, in one native call
    decoder_layers(h, ..) all layers of a model that way
    rms_norm(x, w)        the norm of such layers, whose bits on a GPU are each row's own
    block_linear(x, W)    a linear layer for a block's few rows, whose bits are each row's own

    backends()            what can run here, and why something cannot
    use_backend(name)     choose one; the environment variable CLLM_KERNELS_BACKEND does at import
    build_info()          what was compiled, and why something was not

The automatic choice: CPU tensors use the C++ kernels, CUDA tensors the CUDA C++ kernel where one
was built and else Triton; where neither is there, the reference in plain PyTorch.
"""

from __future__ import annotations

from cllm_kernels._backend import (
    BackendError,
    backends,
    choose_from_environment,
    current_backend,
    use_backend,
)
from cllm_kernels._native import build_info
from cllm_kernels.best_candidate import best_candidate
from cllm_kernels.block_attention import block_attention
from cllm_kernels.block_linear import block_linear
from cllm_kernels.decoder_layer import decoder_layer
from cllm_kernels.decoder_layer.stack import DecoderStack, decoder_layers
from cllm_kernels.decoder_layer.weights import DecoderWeights
from cllm_kernels.draft_window import draft_window
from cllm_kernels.guess_candidates import guess_candidates
from cllm_kernels.guess_pool_add import guess_pool_add
from cllm_kernels.guess_window import guess_window
from cllm_kernels.gumbel_noise import gumbel_noise
from cllm_kernels.jacobi_step import jacobi_step
from cllm_kernels.linear_argmax import linear_argmax
from cllm_kernels.linear_consistency_loss import linear_consistency_loss
from cllm_kernels.rms_norm import rms_norm
from cllm_kernels.row_argmax import row_argmax

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "DecoderStack",
    "DecoderWeights",
    "__version__",
    "backends",
    "best_candidate",
    "block_attention",
    "block_linear",
    "build_info",
    "current_backend",
    "decoder_layer",
    "decoder_layers",
    "draft_window",
    "guess_candidates",
    "guess_pool_add",
    "guess_window",
    "gumbel_noise",
    "jacobi_step",
    "linear_argmax",
    "linear_consistency_loss",
    "rms_norm",
    "row_argmax",
    "use_backend",
]

choose_from_environment()
