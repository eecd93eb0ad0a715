"""linear_consistency_loss in C++ (CPU) and CUDA C++: the in-place pass behind _C."""

from __future__ import annotations

from functools import partial

import torch

from cllm_kernels._common import DTYPE_CODES
from cllm_kernels._native import native_module
from cllm_kernels.linear_consistency_loss import chunked
from cllm_kernels.linear_consistency_loss.chunked import Chunk
from cllm_kernels.linear_consistency_loss.options import DIVERGENCES, LossOptions

_C = native_module()


def _arguments(chunk: Chunk, options: LossOptions) -> tuple:
    student, teacher = chunk.student, chunk.teacher
    rows, columns = student.shape
    return (
        student.data_ptr(),
        teacher.data_ptr(),
        chunk.row_weights.data_ptr(),
        0 if chunk.labels is None else chunk.labels.data_ptr(),
        chunk.scales.data_ptr(),
        chunk.consistency.data_ptr(),
        chunk.cross_entropy.data_ptr(),
        DTYPE_CODES[student.dtype],
        rows,
        columns,
        student.stride(0),
        teacher.stride(0),
        DIVERGENCES.index(options.divergence),
        options.beta,
        1.0 / options.temperature,
        options.label_smoothing,
        options.softcap or 0.0,
        chunk.student_gradient,
        chunk.teacher_gradient,
    )


def _pass_cpu(chunk: Chunk, options: LossOptions) -> None:
    _C.consistency_chunk_cpu(*_arguments(chunk, options), torch.get_num_threads())


def _pass_cuda(chunk: Chunk, options: LossOptions) -> None:
    device = chunk.student.device
    stream = torch.cuda.current_stream(device).cuda_stream
    _C.consistency_chunk_cuda(*_arguments(chunk, options), device.index, stream)


linear_consistency_loss_cpu = partial(chunked.linear_consistency_loss, in_place=_pass_cpu)
linear_consistency_loss_cuda = partial(chunked.linear_consistency_loss, in_place=_pass_cuda)
