"""Several decoder layers, one after the other, in one call: `DecoderStack`, `decoder_layers`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm_kernels._backend import current_backend
from cllm_kernels._common import DTYPE_CODES, eager, shape_text
from cllm_kernels._native import native_module
from cllm_kernels.decoder_layer import OP, decoder_layer
from cllm_kernels.decoder_layer.checks import (
    checked_rows,
    checked_scale,
    checked_window,
    explain,
    fits,
    no_room,
    refuse_gradients,
)
from cllm_kernels.decoder_layer.weights import DecoderWeights

_C = native_module()


class DecoderStack:
    """Layers and their caches, checked together; made once for the many calls that take both as
    they are.

    All tensors are kept, not copied: values written into them in place count from the next call on,
    while other tensors, or other memory under these (a cache that has grown, ``model.to(...)``,
    ``tensor.data = ...``), need another stack.

    Args (L layers, at least one; sizes as in `DecoderWeights`):
        weights: L, of equal sizes, dtype and device.
        k_caches, v_caches: L tensors [B, Hkv, C, D] each, as `decoder_layer` takes them; C may be
            another one in every layer.
        eps, scale: as in `decoder_layer`, of all layers.
        windows: None or a layer's `window`, L of them; () for no windows at all.

    Raises:
        ValueError: sizes or options that do not fit; TypeError: dtypes.
    """

    def __init__(
        self,
        weights: Sequence[DecoderWeights],
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        *,
        eps: float,
        scale: float | None = None,
        windows: Sequence[int | None] = (),
    ):
        count = len(weights)
        if count == 0:
            raise ValueError("DecoderStack: weights must have at least one layer")
        self.weights, self.caches = tuple(weights), tuple(zip(k_caches, v_caches, strict=False))
        self.windows = tuple(windows) or (None,) * count
        for name, given in (("k_caches", k_caches), ("v_caches", v_caches), ("windows", windows)):
            if len(given) != count and (name != "windows" or given):
                raise ValueError(
                    f"DecoderStack: {name} must have one entry for each of the {count} layers, "
                    f"not {len(given)}"
                )
        first = weights[0]
        self.eps, self.scale = eps, checked_scale(first, eps, scale)
        if k_caches[0].dim() != 4:
            raise ValueError(
                f"DecoderStack: k_caches[0] must be [B, Hkv, C, D], not {shape_text(k_caches[0])}"
            )
        batch = k_caches[0].shape[0]
        # what fits every layer, to be held against the others
        like = first.query
        hidden = like.new_empty(batch, 0, first.hidden_size)
        rotary = like.new_empty(1, 0, first.head_size)
        lengths = torch.empty(batch, dtype=torch.int64, device=like.device)
        for index, (layer, (keys, values)) in enumerate(
            zip(self.weights, self.caches, strict=True)
        ):
            try:
                checked_window(self.windows[index])
            except ValueError as error:
                raise ValueError(f"DecoderStack, windows[{index}]: {error}") from None
            if layer.sizes != first.sizes:
                raise ValueError(
                    f"DecoderStack: weights[{index}] have the sizes {layer.sizes} (H, I, Hq, Hkv, "
                    f"D), the first layer's {first.sizes}"
                )
            if not fits(hidden, layer, rotary, rotary, keys, values, lengths):
                try:
                    explain(hidden, layer, rotary, rotary, keys, values, lengths)
                except (ValueError, TypeError) as error:
                    raise type(error)(f"DecoderStack, layer {index}: {error}") from None
        # the narrowest cache is what a block is held against
        self.narrowest = min(range(count), key=lambda index: k_caches[index].shape[2])
        # addresses are of use for plain tensors on a CPU alone
        tensors = [tensor for pair in self.caches for tensor in pair]
        plain = like.is_cpu and eager(like, *tensors) and not any(t.is_neg() for t in tensors)
        self.table = self._table() if plain and _C is not None else None

    def _table(self) -> Tensor:
        """[L, LAYER_FIELDS] int64, what csrc/bindings.cpp reads a layer from."""
        rows = [
            (
                *layer.addresses,
                keys.data_ptr(),
                values.data_ptr(),
                *layer.ranks,
                *keys.stride()[:3],
                *values.stride()[:3],
                keys.shape[2],
                window or 0,
            )
            for layer, (keys, values), window in zip(
                self.weights, self.caches, self.windows, strict=True
            )
        ]
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        assert table.shape[1] == _C.LAYER_FIELDS
        return table

    def __len__(self) -> int:
        return len(self.weights)


def decoder_layers(
    hidden: Tensor,
    stack: DecoderStack,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    *,
    guesses_from: int | None = None,
    guess_width: int | None = None,
    gated_from: int | None = None,
) -> Tensor:
    """`decoder_layer` after `decoder_layer`, with the same bits: in C++ one call, between whose
    layers no thread stops, elsewhere a call for each.

    Args:
        hidden: [B, n, H], what the first layer reads.
        stack: weights and caches.
        cos, sin, lengths, guesses_from, guess_width, gated_from: as in `decoder_layer`.

    Returns:
        [B, n, H], what the last layer gives.

    Raises:
        As `decoder_layer`; on the C++ backend a block that does not fit a cache changes nothing.
    """
    first = stack.weights[0]
    narrowest = stack.caches[stack.narrowest]
    if not fits(hidden, first, cos, sin, *narrowest, lengths):
        explain(hidden, first, cos, sin, *narrowest, lengths)
    batch, n, width = hidden.shape
    guesses, gated = checked_rows(n, guesses_from, guess_width, gated_from)
    if torch.is_grad_enabled():
        for layer, caches in zip(stack.weights, stack.caches, strict=True):
            refuse_gradients(layer, hidden, cos, sin, *caches)
    native = stack.table is not None and OP.choose(hidden.device, current_backend()) == "cpp"
    negative = hidden.is_neg() or cos.is_neg() or sin.is_neg()
    if not native or negative or not eager(hidden, cos, sin, lengths):
        for layer, (keys, values), window in zip(
            stack.weights, stack.caches, stack.windows, strict=True
        ):
            hidden = decoder_layer(
                hidden, layer, cos, sin, keys, values, lengths,
                eps=stack.eps, scale=stack.scale, window=window,
                guesses_from=guesses, guess_width=guess_width, gated_from=gated,
            )  # fmt: skip
        return hidden
    assert stack.table is not None
    out = torch.empty_like(hidden)
    size = first.head_size
    row = _C.decoder_layers_cpu(
        stack.table.data_ptr(),
        len(stack),
        (hidden.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), lengths.data_ptr()),
        DTYPE_CODES[hidden.dtype],
        (
            batch,
            n,
            width,
            first.gate.shape[0],
            first.heads,
            first.kv_heads,
            size,
            n * size if cos.shape[0] == batch else 0,
            guesses,
            guess_width or max(1, n - guesses),
            gated,
        ),
        stack.scale,
        stack.eps,
        torch.get_num_threads(),
    )
    if row >= 0:
        raise no_room(lengths, n, narrowest[0], row)
    return out
