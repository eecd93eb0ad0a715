"""linear_argmax on the CPU: products over chunks of the vocabulary, C++ for the argmax.

A chunk's scores stay in cache between the two. The few rows of a block go through block_linear's
product, whose scores are fp32 in every dtype. More rows are torch's matmul, and then what the
scores are depends on the dtype:

- float32: the matmul's own output.
- bfloat16 and float16, where torch's matmul is fast in that dtype (oneDNN with the instructions
  for it): it accumulates in fp32 but rounds its output to 16 bits, and rounding ties tokens that
  differ. Rounding is monotone, so the winner is among the tied: those are computed again in fp32.
  With noise, which reorders what rounding tied, every token whose score may have been high enough
  before it was rounded to beat the winner so far is computed again: a handful per row, because few
  come that near to it.
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
from cllm_kernels.block_linear.native import linear_into
from cllm_kernels.gumbel_noise.arguments import check_row_ids

_C = native_module()

# Rows of the weight per matmul, by a fixed count: at 16 rows of hidden a chunk's scores take 256 to
# 512 KiB, within any L2, and the scores of the vocabulary are never held. torch's fp32 matmul of
# few rows is faster in such pieces than whole (14.6 against 21.5 ms for [16, 576] x [49152, 576] on
# two AVX-512 cores); its bf16 matmul does not care, and fewer pieces wait for threads less often.
# All are multiples of 64, the vocabulary entries whose noise is made together.
_CHUNK = {torch.float32: 4096, torch.bfloat16: 16384, torch.float16: 16384}
_WIDENED = 2048  # where a chunk of the weight itself is written out in fp32
_FEW = 64  # rows for which reading the weight is most of the work
_ROWS = 512  # of hidden at a time, so that the scores stay small for long inputs too


def linear_argmax_cpu(
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    softcap: float | None,
    temperature: float | None,
    seed: Tensor | None,  # [1] int64
    row: Tensor | None,  # [M] int64
    position: Tensor | None,  # [M] int64
) -> tuple[Tensor, Tensor]:
    """(index [M] int64, value [M] float32)."""
    rows = hidden.shape[0]
    seed_at = row_at = position_at = 0
    if seed is not None and row is not None and position is not None:
        check_row_ids("linear_argmax", row)
        seed_at, row_at, position_at = seed.data_ptr(), row.data_ptr(), position.data_ptr()
    scaling = (softcap or 0.0, 1.0 if temperature is None else 1.0 / temperature)
    index = torch.full((rows,), -1, dtype=torch.int64, device="cpu")
    value = torch.empty(rows, dtype=torch.float32, device="cpu")
    bias = None if bias is None else bias.detach().float().contiguous()
    hidden = hidden.detach().contiguous()
    weight = weight.detach()
    for begin in range(0, rows, _ROWS):
        end = min(begin + _ROWS, rows)
        result = (index[begin:end], value[begin:end])
        skip = 8 * begin if seed_at else 0
        noise = (seed_at, row_at + skip, position_at + skip)
        _sweep(hidden[begin:end], weight, bias, scaling, noise, *result)
    return index, value


def _sweep(
    hidden: Tensor,  # [R, H], contiguous
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V] float32
    scaling: tuple[float, float],  # soft-cap (0: none) and 1 / temperature
    noise: tuple[int, int, int],  # addresses of seed, row [R] and position [R], or zeros
    index: Tensor,  # [R], -1 at first, written
    value: Tensor,  # [R], written
) -> None:
    """One pass over the vocabulary for the rows of hidden."""
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    dtype = hidden.dtype
    in_rows = weight.stride(1) == 1
    few = in_rows and rows <= _FEW
    exact = in_rows and not few and dtype is not torch.float32 and fast_cpu_matmul(dtype)
    widened = None
    if few:
        dtype = torch.float32
    elif dtype is not torch.float32 and not exact:
        dtype = torch.float32
        hidden = hidden.float()
        widened = torch.empty(min(_WIDENED, vocabulary), width, dtype=torch.float32, device="cpu")
    size = min(_CHUNK[dtype] if widened is None else _WIDENED, vocabulary)
    scores = torch.empty(rows, size, dtype=dtype, device="cpu")
    code, threads = DTYPE_CODES[dtype], torch.get_num_threads()
    for first in range(0, vocabulary, size):
        chunk = weight[first : first + size]
        columns = chunk.shape[0]
        part = scores if columns == size else scores[:, :columns]
        if few:
            linear_into(part, hidden, chunk)
        else:
            if widened is not None:
                chunk = widened[:columns].copy_(chunk)
            torch.mm(hidden, chunk.t(), out=part)
        bias_address = 0 if bias is None else bias.data_ptr() + 4 * first
        table = (scores.data_ptr(), code, rows, size, columns)
        arguments = (*table, bias_address, *scaling, first, *noise)
        result = (index.data_ptr(), value.data_ptr(), threads)
        if exact:
            operands = (hidden.data_ptr(), width, chunk.data_ptr(), chunk.stride(0), width)
            _C.running_argmax_exact_cpu(*arguments, *operands, *result)
        else:
            _C.running_argmax_cpu(*arguments, *result)
