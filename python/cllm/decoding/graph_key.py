"""What a capture is of: everything that is baked into it, as the key that it is kept under."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from cllm_kernels import current_backend

from ..adapter import low_rank
from ..linears import replaced as linear_replaced
from .attention import chosen_implementation
from .layers import replaced as layer_replaced
from .layouts import Layout

# transformers leaves hooks on a model that was once asked for hidden states or attentions; they do
# nothing until it is asked again
_IDLE_HOOKS = "transformers.utils.output_capturing"


def forward_key(
    model: Any,
    *,
    batch: int,
    slots: int,
    device: torch.device,
    position_limit: int | None,
    layout: Layout,
    head: Any = None,
    adapter: Any = None,
) -> tuple:
    """Of a forward with the cache it writes to; arguments as those of `graphs.graphed_forward`."""
    # a capture reads tensors by their address
    tensors = (*model.parameters(), *model.buffers())
    weights = hash(tuple(tensor.data_ptr() for tensor in tensors))
    kinds = hash(tuple(type(module) for module in model.modules()))
    # what else decides which kernels run, and whether calls may write to each other's tensors
    modes = (
        chosen_implementation(model.config.get_text_config()),
        current_backend(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.is_inference_mode_enabled(),
        *_tuner_states(model),
        _hooks(model),
        _adapter_state(adapter),
    )
    return (
        *(batch, slots, device, position_limit, layout, head is None, weights, kinds),
        *modes,
    )


def watched(model: Any) -> bool:
    """Whether somebody else looks on while `model` runs, or has changed how it does: hooks on it,
    on a part of it or on all modules, a forward of somebody's own, or a mode that sees operations
    (a count of FLOPs, say). Python that is not run does not look."""
    if _get_current_dispatch_mode_stack():
        return True
    # a default device (`torch.set_default_device`) looks at nothing
    if any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()):
        return True
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    for module in model.modules():
        if any(not _ours(hook) for hook in _hooks_of(module)):
            return True
        if "forward" in module.__dict__ and not (linear_replaced(module) or layer_replaced(module)):
            return True
    return False


def _ours(hook: Any) -> bool:
    return getattr(hook, "__module__", None) in (low_rank.__name__, _IDLE_HOOKS)


def _hooks_of(module: Any) -> tuple[Any, ...]:
    return (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def _hooks(model: Any) -> tuple[int, ...]:
    """Those that somebody else put on modules of `model`; an adapter's are not among them."""
    everywhere = (
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
    )
    own = (hook for module in model.modules() for hook in _hooks_of(module) if not _ours(hook))
    return tuple(id(hook) for hook in (*everywhere, *own))


def _tuner_states(model: Any) -> list[tuple[bool, str, bool, str]]:
    """Which adapters the PEFT layers of `model` apply, and how much; to switch them changes no
    address."""
    return [
        (
            *(module._disable_adapters, str(module.active_adapters), module.merged),
            str(getattr(module, "scaling", None)),
        )
        for module in model.modules()
        if hasattr(module, "_disable_adapters")
    ]


def _adapter_state(adapter: Any) -> int | None:
    """Where its weights are and how often they were changed in place; an adapter made anew around
    the same tensors has the same captures."""
    if adapter is None:
        return None
    pairs = adapter.weights.items()
    return hash(
        tuple(
            (name, pair.scaling, *((t.data_ptr(), low_rank.version(t)) for t in (pair.a, pair.b)))
            for name, pair in pairs
        )
    )
