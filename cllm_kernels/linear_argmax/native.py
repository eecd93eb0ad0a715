"""linear_argmax on the CPU: torch's matmul over chunks of the vocabulary, C++ for the argmax.

A chunk's scores stay in cache between the two. What the scores are depends on the dtype:

- float32: the matmul's own output.
- bfloat16 and float16, where torch's matmul is fast in that dtype (oneDNN with the instructions
  for it): it accumulates in fp32 but rounds its output to 16 bits, and rounding ties tokens that
  differ. Rounding is monotone, so the winner is among the tied: those are computed again in fp32.
- bfloat16 and float16 elsewhere: each chunk of the weight is widened to fp32 and multiplied there
  (torch's own fp16 matmul without such instructions is slower and off by tens of units in the last
  place).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels._common import DTYPE_CODES
from cllm_kernels._matmul import fast_cpu_matmul
from cllm_kernels._native import native_module

_C = native_module()

# Rows of the weight per matmul, by a fixed count: at 16 rows of hidden a chunk's scores take 256 to
# 512 KiB, within any L2, and the scores of the vocabulary are never held. torch's fp32 matmul of
# few rows is faster in such pieces than whole (14.6 against 21.5 ms for [16, 576] x [49152, 576] on
# two AVX-512 cores); its bf16 matmul does not care, and fewer pieces wait for threads less often.
_CHUNK = {torch.float32: 4096, torch.bfloat16: 16384, torch.float16: 16384}
_WIDENED = 2048  # where a chunk of the weight itself is written out in fp32
_ROWS = 512  # of hidden at a time, so that the scores stay small for long inputs too


@torch.no_grad()
def linear_argmax_cpu(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(index [M] int64, value [M] float32)."""
    rows = hidden.shape[0]
    index = torch.full((rows,), -1, dtype=torch.int64)
    value = torch.empty(rows, dtype=torch.float32)
    bias = None if bias is None else bias.float().contiguous()
    hidden = hidden.detach().contiguous()
    weight = weight.detach()
    for begin in range(0, rows, _ROWS):
        end = min(begin + _ROWS, rows)
        _sweep(hidden[begin:end], weight, bias, softcap, index[begin:end], value[begin:end])
    return index, value


def _sweep(
    hidden: Tensor,  # [R, H], contiguous
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V] float32
    softcap: float | None,
    index: Tensor,  # [R], -1 at first, written
    value: Tensor,  # [R], written
) -> None:
    """One pass over the vocabulary for the rows of hidden."""
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    dtype = hidden.dtype
    exact = dtype is not torch.float32 and fast_cpu_matmul(dtype) and weight.stride(1) == 1
    widened = None
    if dtype is not torch.float32 and not exact:
        dtype = torch.float32
        hidden = hidden.float()
        widened = torch.empty(min(_WIDENED, vocabulary), width)
    size = min(_CHUNK[dtype] if widened is None else _WIDENED, vocabulary)
    scores = torch.empty(rows, size, dtype=dtype)
    code, threads, cap = DTYPE_CODES[dtype], torch.get_num_threads(), softcap or 0.0
    for first in range(0, vocabulary, size):
        chunk = weight[first : first + size]
        columns = chunk.shape[0]
        if widened is not None:
            chunk = widened[:columns].copy_(chunk)
        torch.mm(hidden, chunk.t(), out=scores if columns == size else scores[:, :columns])
        bias_address = 0 if bias is None else bias.data_ptr() + 4 * first
        arguments = (scores.data_ptr(), code, rows, size, columns, bias_address, cap, first)
        result = (index.data_ptr(), value.data_ptr(), threads)
        if exact:
            operands = (hidden.data_ptr(), width, chunk.data_ptr(), chunk.stride(0), width)
            _C.running_argmax_exact_cpu(*arguments, *operands, *result)
        else:
            _C.running_argmax_cpu(*arguments, *result)
