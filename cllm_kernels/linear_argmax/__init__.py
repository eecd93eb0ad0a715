"""linear_argmax: a language model's head and its argmax, or a sample, without the logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cllm_kernels._backend import Op, register
from cllm_kernels._common import FLOAT_DTYPES, LIBRARY, dtype_text, eager, shape_text
from cllm_kernels.gumbel_noise.arguments import Ids, Seed, noise_tensors


def _reference() -> Any:
    from cllm_kernels.linear_argmax import reference

    return reference.linear_argmax


def _cpp() -> Any:
    from cllm_kernels.linear_argmax import native

    return native.linear_argmax_cpu


def _triton() -> Any:
    from cllm_kernels.linear_argmax import triton_kernel

    return triton_kernel.linear_argmax


OP = register(
    Op(
        name="linear_argmax",
        implementations={"reference": _reference, "cpp": _cpp, "triton": _triton},
        preference={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def linear_argmax(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | None = None,
    noise: tuple[Seed, Ids, Ids] | None = None,
) -> tuple[Tensor, Tensor]:
    """argmax over v of softcap(hidden @ weight.T + bias) / temperature + noise, row by row.

    softcap(x) is softcap * tanh(x / softcap). Scores are accumulated, biased, capped, scaled,
    perturbed and compared in fp32. The lowest index wins a tie; a NaN counts as larger than
    everything and the first NaN wins, as in torch.argmax.

    With noise the index is an exact sample from softmax(logits / temperature), a function of the
    row's logits and of its key (seed, row, position) alone: the same in every batch and, as far as
    the logits are, on every backend (see `gumbel_noise`, whose numbers are added).

    Args:
        hidden: [M, H] float32, bfloat16 or float16; M may be 0.
        weight: [V, H] of the same dtype and device, V >= 1.
        bias: [V] float32 or of hidden's dtype, or None.
        softcap: a positive number, or None for no soft-capping (Gemma 2, Gemma Team 2024, sec. 2).
        temperature: a positive number (1e-30 to 1e30) to divide by, or None for 1. For the most
            likely token leave noise out: no temperature is needed then, and 0 is none.
        noise: (seed, row, position), or None for no noise. seed: an int of 64 bits, or an int64
            tensor, [] or [1]. row: [M] int64, the id of each row's sequence, below 2^32; or an int
            for all. position: [M] int64, the place in its sequence of the token to be drawn; or an
            int for all.

    Returns:
        (index [M] int64, value [M] float32). The value is the winner's score, all of the above
        included: with noise not a logit, but (minus log-sum-exp of logits / temperature) a sample
        of the standard Gumbel distribution. No gradient flows through either.

    Raises:
        ValueError: shapes or devices that do not fit, a number out of its range.
        TypeError: a wrong dtype. BackendError: see `use_backend`.
    """
    if not (
        hidden.dim() == 2
        and weight.dim() == 2
        and weight.shape[1] == hidden.shape[1]
        and weight.shape[0] >= 1
        and hidden.dtype in FLOAT_DTYPES
        and weight.dtype is hidden.dtype
        and weight.device == hidden.device
        and bias is softcap is temperature is None
    ):
        _check(hidden, weight, bias, softcap, temperature)
    seed = row = position = None
    if noise is not None:
        seed, row, position = _noise(noise, hidden)
    if bias is None and seed is None:
        direct = eager(hidden, weight)
    else:
        direct = eager(*(x for x in (hidden, weight, bias, seed, row, position) if x is not None))
    # asked last: a compiler, which is not direct, cannot trace the question
    if direct:
        negated = hidden.is_neg() or weight.is_neg()
        direct = not (negated or (bias is not None and bias.is_neg()))
    if direct:
        hidden = hidden.detach() if hidden.requires_grad else hidden
        weight = weight.detach() if weight.requires_grad else weight
        run = OP.resolve(hidden.device)
        return run(hidden, weight, bias, softcap, temperature, seed, row, position)
    bias = None if bias is None else bias.detach()
    return torch.ops.cllm_kernels.linear_argmax.default(
        hidden.detach(), weight.detach(), bias, softcap, temperature, seed, row, position
    )


def _noise(noise: tuple[Seed, Ids, Ids], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(noise, tuple | list) or len(noise) != 3:
        raise ValueError("linear_argmax: noise must be (seed, row, position) or None")
    return noise_tensors("linear_argmax: noise", *noise, hidden.shape[0], hidden.device)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float | None,
) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"linear_argmax: hidden must be [M, H], not {shape_text(hidden)}")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"linear_argmax: weight must be [V, {hidden.shape[1]}] with V >= 1 to fit hidden "
            f"{shape_text(hidden)}, not {shape_text(weight)}"
        )
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(
            "linear_argmax: hidden must be float32, bfloat16 or float16, "
            f"not {dtype_text(hidden.dtype)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"linear_argmax: weight is {dtype_text(weight.dtype)} but hidden is "
            f"{dtype_text(hidden.dtype)}; they must have the same dtype"
        )
    if weight.device != hidden.device:
        raise ValueError(
            f"linear_argmax: weight is on {weight.device} but hidden is on {hidden.device}"
        )
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"linear_argmax: bias must be [{weight.shape[0]}], one entry per row of weight, "
                f"not {shape_text(bias)}"
            )
        if bias.dtype not in (hidden.dtype, torch.float32):
            raise TypeError(
                f"linear_argmax: bias must be float32 or {dtype_text(hidden.dtype)}, "
                f"not {dtype_text(bias.dtype)}"
            )
        if bias.device != hidden.device:
            raise ValueError(
                f"linear_argmax: bias is on {bias.device} but hidden is on {hidden.device}"
            )
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"linear_argmax: softcap must be a positive number or None, not {softcap}")
    # Beyond these bounds a number or its reciprocal leaves the range of fp32.
    if temperature is not None and not 1e-30 <= temperature <= 1e30:
        raise ValueError(
            "linear_argmax: temperature must be a positive finite number (1e-30 to 1e30) or None, "
            f"not {temperature}; for the most likely token pass no noise"
        )


# The seed is a tensor here: a number would be compiled in.
LIBRARY.define(
    "linear_argmax(Tensor hidden, Tensor weight, Tensor? bias, float? softcap, "
    "float? temperature=None, Tensor? seed=None, Tensor? row=None, Tensor? position=None) "
    "-> (Tensor index, Tensor value)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatched(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float | None = None,
    *noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    seed, row, position = noise or (None, None, None)
    run = OP.resolve(hidden.device)
    return run(hidden, weight, bias, softcap, temperature, seed, row, position)


def _fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows, dtype=torch.float32),
    )


LIBRARY.impl("linear_argmax", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("cllm_kernels::linear_argmax", _fake, lib=LIBRARY)
