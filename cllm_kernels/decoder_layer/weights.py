"""The tensors of one decoder layer, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cllm_kernels._common import FLOAT_DTYPES, PLAIN_TYPES, dtype_text, shape_text

LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
LowRank = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """What `decoder_layer` multiplies by; made once for many calls, which take it as checked.

    The tensors are kept, not copied: values written into them in place count from the next call
    on, while a module that is given other tensors (``model.to(...)``) needs new `DecoderWeights`.

    Args (hidden size H, MLP size I, Hq query heads, Hkv key and value heads, head size D):
        query: [Hq * D, H]; key, value: [Hkv * D, H]; output: [H, Hq * D]; gate, up: [I, H];
            down: [H, I]. All contiguous, of one dtype (float32, bfloat16, float16) and device.
        attention_norm, mlp_norm: [H], of the RMS norms before attention and MLP.
        head_size: D, even, at most 256.
        query_norm, key_norm: [D] of an RMS norm of every head, both or none.
        biases: one for each linear layer in the order above, [its rows] or None; () for none.
        low_rank: (a [R, width], b [rows, R]) for each linear layer in the order above or None, see
            `cllm_kernels.block_linear`; () for none.

    Raises:
        ValueError: shapes, strides or devices that do not fit; TypeError: dtypes, or a subclass of
            torch.Tensor (other than Parameter).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    head_size: int
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    biases: Sequence[Tensor | None] = ()
    low_rank: Sequence[LowRank | None] = ()
    tensors: tuple[Tensor, ...] = field(init=False, repr=False)  # all there are
    addresses: tuple[int, ...] = field(init=False, repr=False)
    ranks: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(LINEARS)
        for name in ("biases", "low_rank"):
            given = tuple(getattr(self, name)) or (None,) * count
            if len(given) != count:
                raise ValueError(
                    f"DecoderWeights: {name} must have {count} entries, one for each linear layer, "
                    f"not {len(given)}"
                )
            object.__setattr__(self, name, given)
        if (self.query_norm is None) != (self.key_norm is None):
            raise ValueError("DecoderWeights: query_norm and key_norm must be given both or not")
        self._check_sizes()
        expected = self._expected()
        for name, tensor, shape in expected:
            self._check(name, tensor, shape)
        object.__setattr__(self, "tensors", tuple(tensor for _, tensor, _ in expected))
        object.__setattr__(self, "addresses", self._addresses())
        ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in self.low_rank)
        object.__setattr__(self, "ranks", ranks)

    @property
    def linears(self) -> tuple[Tensor, ...]:
        """The seven weights, in order."""
        return tuple(getattr(self, name) for name in LINEARS)

    @property
    def hidden_size(self) -> int:
        return self.query.shape[1]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """H, I, Hq, Hkv, D."""
        return (
            self.hidden_size,
            self.gate.shape[0],
            self.heads,
            self.kv_heads,
            self.head_size,
        )

    @property
    def heads(self) -> int:
        return self.query.shape[0] // self.head_size

    @property
    def kv_heads(self) -> int:
        return self.key.shape[0] // self.head_size

    def _check_sizes(self) -> None:
        if not (2 <= self.head_size <= 256 and self.head_size % 2 == 0):
            raise ValueError(
                f"DecoderWeights: head_size must be even and from 2 to 256, not {self.head_size}"
            )
        if self.query.dim() != 2 or self.key.dim() != 2 or self.gate.dim() != 2:
            raise ValueError("DecoderWeights: query, key and gate must be [rows, H]")
        if not self.query.shape[1] or not self.gate.shape[0]:
            raise ValueError(
                f"DecoderWeights: hidden size {self.query.shape[1]} and MLP size "
                f"{self.gate.shape[0]} must be at least 1"
            )
        heads, kv_heads = self.query.shape[0], self.key.shape[0]
        if heads % self.head_size or kv_heads % self.head_size or not heads or not kv_heads:
            raise ValueError(
                f"DecoderWeights: the {heads} rows of query and {kv_heads} of key must be "
                f"multiples of head_size {self.head_size}"
            )
        if heads % kv_heads:
            raise ValueError(
                f"DecoderWeights: {self.heads} query heads are no multiple of {self.kv_heads} "
                "key heads"
            )
        if self.query.dtype not in FLOAT_DTYPES:
            raise TypeError(
                "DecoderWeights: query must be float32, bfloat16 or float16, "
                f"not {dtype_text(self.query.dtype)}"
            )

    def _expected(self) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        """Name, tensor and the shape it must have, of every tensor there is."""
        hidden, inner = self.query.shape[1], self.gate.shape[0]
        heads, keys = self.query.shape[0], self.key.shape[0]
        shapes = [(heads, hidden), (keys, hidden), (keys, hidden), (hidden, heads)]
        shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
        expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("attention_norm", self.attention_norm, (hidden,)),
            ("mlp_norm", self.mlp_norm, (hidden,)),
            ("query_norm", self.query_norm, (self.head_size,)),
            ("key_norm", self.key_norm, (self.head_size,)),
        ]
        for index, (name, (rows, width)) in enumerate(zip(LINEARS, shapes, strict=True)):
            expected.append((name, getattr(self, name), (rows, width)))
            expected.append((f"biases[{index}] ({name})", self.biases[index], (rows,)))
            pair = self.low_rank[index]
            if pair is not None:
                rank = pair[0].shape[0] if pair[0].dim() else 0
                label = f"low_rank[{index}] ({name})"
                expected += [(label, pair[0], (rank, width)), (label, pair[1], (rows, rank))]
        return [entry for entry in expected if entry[1] is not None]  # type: ignore[misc]

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if type(tensor) not in PLAIN_TYPES:  # others need not have their numbers at data_ptr()
            raise TypeError(
                f"DecoderWeights: {name} must be a plain tensor, not {type(tensor).__name__}"
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"DecoderWeights: {name} must be {list(shape)} to fit the others, "
                f"not {shape_text(tensor)}"
            )
        if tensor.dtype is not self.query.dtype:
            raise TypeError(
                f"DecoderWeights: {name} is {dtype_text(tensor.dtype)} but query is "
                f"{dtype_text(self.query.dtype)}; they must have the same dtype"
            )
        if tensor.device != self.query.device:
            raise ValueError(
                f"DecoderWeights: {name} is on {tensor.device} but query is on {self.query.device}"
            )
        if not tensor.is_contiguous() or tensor.is_neg():
            raise ValueError(f"DecoderWeights: {name} {shape_text(tensor)} must be contiguous")

    def _addresses(self) -> tuple[int, ...]:
        """Of weight, bias, a and b of every linear layer, then of the norms; 0 where there is
        none. Empty off the CPU, where nothing reads them."""
        if self.query.device.type != "cpu":
            return ()
        tensors: list[Tensor | None] = []
        for weight, bias, pair in zip(self.linears, self.biases, self.low_rank, strict=True):
            tensors += [weight, bias, *(pair or (None, None))]
        tensors += [self.attention_norm, self.mlp_norm, self.query_norm, self.key_norm]
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def below_each_other(matrices: Sequence[Tensor]) -> bool:
    """Whether contiguous matrices [rows, width] are one such matrix in memory."""
    place, storage = matrices[0].data_ptr(), matrices[0].untyped_storage().data_ptr()
    for matrix in matrices:
        # neighbours by chance are none
        if matrix.data_ptr() != place or matrix.untyped_storage().data_ptr() != storage:
            return False
        place += matrix.nbytes
    return True


def plain_tensors(weights: DecoderWeights) -> list[torch.Tensor | None]:
    """All of `weights` in one list: what a dispatcher that knows no classes can carry."""
    tensors: list[Tensor | None] = [*weights.linears, *weights.biases]
    for pair in weights.low_rank:
        tensors += pair or (None, None)
    norms = (weights.attention_norm, weights.mlp_norm, weights.query_norm, weights.key_norm)
    return [*tensors, *norms]


def from_plain(tensors: Sequence[Tensor | None], head_size: int) -> DecoderWeights:
    """The inverse of `plain_tensors`."""
    count = len(LINEARS)
    linears, biases = tensors[:count], tensors[count : 2 * count]
    flat = tensors[2 * count : 4 * count]
    pairs = [
        None if a is None or b is None else (a, b)
        for a, b in zip(flat[::2], flat[1::2], strict=True)
    ]
    attention_norm, mlp_norm, query_norm, key_norm = tensors[4 * count :]
    there: dict[str, Any] = dict(zip(LINEARS, linears, strict=True))
    there |= {"attention_norm": attention_norm, "mlp_norm": mlp_norm}
    return DecoderWeights(
        **there,
        head_size=head_size,
        query_norm=query_norm,
        key_norm=key_norm,
        biases=biases,
        low_rank=pairs,
    )
