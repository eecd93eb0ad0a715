"""What the ops share: the eager fast path, argument errors, dtype codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from cllm_kernels._native import native_module

Result = TypeVar("Result")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The numbers of enum class Dtype in csrc/ops.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

LIBRARY = torch.library.Library("cllm_kernels", "FRAGMENT")

# Private names of torch that tell whether something watches the calls. Where one of them is gone,
# every call takes the dispatcher's way: slower by a few microseconds, never wrong.
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", None)
_transforms: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_tracing: Any = getattr(torch._C, "_get_tracing_state", None)
_can_tell = None not in (_dispatch_modes, _function_modes, _transforms, _tracing)
PLAIN_TYPES = (Tensor, Parameter)
_DEVICES = ("cpu", "cuda")


def _install_direct() -> Any:
    """_C, if its direct functions can read this torch's tensors (csrc/direct.h); else None."""
    native = native_module()
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.11
    if native is None or not _can_tell or type(exchange).__name__ != "PyCapsule":
        return None
    watchers = (_dispatch_modes, _function_modes, _transforms, _tracing)
    return native if native.direct_install(exchange, Tensor, Parameter, *watchers) else None


DIRECT = _install_direct()


def _eager(*tensors: Tensor) -> bool:
    if is_compiling() or not _can_tell:
        return False
    if _dispatch_modes() or _function_modes() or _transforms() or _tracing() is not None:
        return False
    for tensor in tensors:
        if type(tensor) not in PLAIN_TYPES:
            return False
    return tensors[0].device.type in _DEVICES


def _eager_direct(*tensors: Tensor) -> bool:
    return not is_compiling() and _ask(*tensors)


def eager(*tensors: Tensor) -> bool:
    """Whether the implementation may be called directly, around torch's dispatcher.

    True for plain tensors, the first of them on a CPU or CUDA device, with no compiler, tracer,
    mode or functional transform at work. Going through the dispatcher costs more than a small op
    itself.
    """
    return _eager(*tensors)


if DIRECT is not None:
    _ask: Callable[..., bool] = DIRECT.direct_eager
    eager = _eager_direct


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, run as if there were no torch.autocast, which would round what its products
    read and give results of another dtype; its first argument tells the device."""

    @wraps(function)
    def run(first: Tensor, *rest: Any) -> Result:
        device = first.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):  # which meta has not
            return function(first, *rest)
        with torch.autocast(device, enabled=False):
            return function(first, *rest)

    return run


def shape_text(tensor: Tensor) -> str:
    """A shape for an error message: [16, 49152]."""
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_int64(op: str, like: tuple[str, Tensor], **tensors: Tensor) -> None:
    """Raises TypeError or ValueError for the first of `tensors` that is not int64, contiguous and
    where `like`, a name and its tensor, is."""
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.int64:
            raise TypeError(f"{op}: {name} must be int64, not {dtype_text(tensor.dtype)}")
        if tensor.device != like[1].device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {like[0]} is on {like[1].device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous; pass {name}.contiguous()")
