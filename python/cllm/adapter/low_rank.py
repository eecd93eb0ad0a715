"""The low-rank term of gated rows: ``(x @ a^T) @ b^T``.

On a CPU it is a part of the layer's own product (`cllm.linears`). Everywhere else, and in forwards
of many rows, a hook adds it to the module's output in place.

Modules that read one input (query, key and value projections; gate and up projections) have their
A matrices stacked, so that one product serves all of them. Which modules do is seen, not guessed:
in the first gated forward, by the tensor that they are handed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cllm_kernels.decoder_layer.weights import below_each_other

from ..traits import UnsupportedModelError
from .gate import Gate
from .weights import LowRank

if TYPE_CHECKING:
    from ..linears import Term

Hook = Callable[[torch.nn.Module, Any, Any], None]
Add = Callable[[Any, Any, tuple[int, int, int]], None]


class _Part:
    """One module's matrices for its hook; made when the hook first needs them.

    Attributes:
        group: of modules that read the same input, None for a module alone.
        columns: of the group's product [.., sum of r] that are this module's.
    """

    def __init__(self, name: str, weights: LowRank, like: Tensor) -> None:
        self.name = name
        self.group: _Group | None = None
        self.columns = slice(0, weights.rank)
        self._weights = weights
        self._device = like.device
        # thin 16-bit products on a CPU take ten times as long as those in fp32
        least = torch.float32 if like.device.type == "cpu" else like.dtype
        self._dtype = torch.promote_types(like.dtype, least)

    @cached_property
    def a(self) -> Tensor:
        """[r, in]; within its group's stack, where it has a group."""
        return self._weights.a.to(self._device, self._dtype)

    @cached_property
    def b(self) -> Tensor:
        """[r, out], transposed, with the scale in it."""
        return _scaled(self._weights, self._device).to(self._dtype).t()


# Of a module's name: the versions of its two tensors, and what `FusedTerm` made of them.
Casts = dict[tuple[str, torch.dtype, torch.device], tuple[tuple[int, int], tuple[Tensor, Tensor]]]


class FusedTerm:
    """One module's matrices as `cllm_kernels.block_linear` takes them (a `cllm.linears.Term`).

    Args:
        add: adds the term to an output, as the hook does.
        casts: what earlier calls made of the same adapter, to be used again unless a tensor has
            changed since; added to.
    """

    def __init__(
        self, gate: Gate, add: Add, casts: Casts, name: str, weights: LowRank, like: Tensor
    ) -> None:
        self.rows = gate.rows
        self.add = add
        self._casts = casts
        self._name = name
        self._weights = weights
        self._dtype, self._device = like.dtype, like.device
        self._made_of = (-1, -1)  # versions of the two tensors

    @cached_property
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """a [R, in] and b [out, R] of the module's dtype, scale and all; R: the rank, on a GPU
        filled up with zeros to a multiple of 32."""
        weights, key = self._weights, self._key
        versions = self._made_of = version(weights.a), version(weights.b)
        known = self._casts.get(key)
        if known is not None and known[0] == versions:
            return known[1]
        b = _scaled(weights, self._device)
        a = weights.a.to(self._device, b.dtype)
        # finite in every dtype: infinity times the zeros of rows that are not gated would be NaN
        most = torch.finfo(self._dtype).max
        a, b = (tensor.clamp(-most, most).to(self._dtype) for tensor in (a, b))
        empty = 0 if self._device.type == "cpu" else -weights.rank % 32
        pad = torch.nn.functional.pad
        made = pad(a, (0, 0, 0, empty)).contiguous(), pad(b, (0, empty)).contiguous()
        self._casts[key] = versions, made
        return made

    def lay_above(self, others: Sequence[Term]) -> None:
        """See `cllm.linears.Term`; they stay so for further calls."""
        terms = [self, *(other for other in others if isinstance(other, FusedTerm))]
        matrices = [term.low_rank[0] for term in terms]
        if below_each_other(matrices):
            return
        parts = torch.cat(matrices).split([len(matrix) for matrix in matrices])
        for term, part in zip(terms, parts, strict=True):
            made = part, term.low_rank[1]
            term.__dict__["low_rank"] = made  # the property's value, which captures hold it by
            term._casts[term._key] = term._made_of, made

    @property
    def _key(self) -> tuple[str, torch.dtype, torch.device]:
        return self._name, self._dtype, self._device


def version(tensor: Tensor) -> int:
    """Goes up with every change in place; nobody counts those of inference tensors."""
    return -1 if tensor.is_inference() else tensor._version


def _scaled(weights: LowRank, device: torch.device) -> Tensor:
    """b with the scale in it, before anything is rounded."""
    precise = torch.promote_types(weights.b.dtype, torch.float32)
    return weights.b.to(device, precise) * weights.scaling


class _Group:
    """Modules that read one input.

    Attributes:
        first: the part whose module runs first.
        stack: [sum of r, in].
    """

    def __init__(self, parts: list[_Part]) -> None:
        self.first = parts[0]
        self.stack = torch.cat([part.a for part in parts])
        start = 0
        for part in parts:
            part.columns = slice(start, start := start + part.a.shape[0])
            part.a = self.stack[part.columns]
            part.group = self


class _Seen(threading.local):
    """What a thread's forward has come by.

    Attributes:
        x, version, rows: the input of the latest product that others may share, its version, and
            the opening of the gate.
        product: [rows, sum of r] of `x` and the stack of `group`.
        runs: while groups are unknown, the parts in the order they ran, neighbours of one input
            together.
    """

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.version = 0
        self.rows: tuple[int, int, int] | None = None
        self.group: _Group | None = None
        self.product: Tensor | None = None
        self.runs: list[list[_Part]] = []


class LowRankRows:
    """Makes the terms and hooks of the modules that an adapter targets.

    Args:
        gate: says which rows get the term. The others are not touched: no product with a mask, so
            their bits are the base model's.
        groups: names of modules that read one input, as `groups` of an earlier one; None: they are
            found in the first gated forward.
    """

    def __init__(self, gate: Gate, groups: tuple[tuple[str, ...], ...] | None = None) -> None:
        self.gate = gate
        self.groups = groups
        self._parts: dict[str, _Part] = {}
        self._stacked = False
        self._seen = _Seen()

    def term(self, casts: Casts, name: str, weights: LowRank, like: Tensor) -> FusedTerm:
        """The term of a `cllm.linears.fusable` module."""
        return FusedTerm(self.gate, self._adder(name, weights, like), casts, name, weights, like)

    def hook(self, name: str, weights: LowRank, like: Tensor) -> Hook:
        """A forward hook of the module called `name`, whose own weights are like `like`."""
        add, gate = self._adder(name, weights, like), self.gate

        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            rows = gate.rows()
            if rows is not None:
                add(inputs[0] if inputs else None, output, rows)

        return hook

    def _adder(self, name: str, weights: LowRank, like: Tensor) -> Add:
        """What adds the term to the gated rows of a module's output."""
        part = self._parts[name] = _Part(name, weights, like)

        def add(x: Any, output: Any, rows: tuple[int, int, int]) -> None:
            first, batch, width = rows
            for tensor in (x, output):
                if not isinstance(tensor, Tensor) or tensor.shape[:-1] not in (
                    (batch, width),
                    (batch * width,),
                ):
                    raise UnsupportedModelError(
                        f"{name} does not see the window's tokens in order, so the adapter cannot "
                        "be told from the base there; train one without this target"
                    )
            shrunk = self._shrunk(part, x, rows)
            if batch == 1:
                target = output.view(width, -1)[first:]
                if target.dtype == shrunk.dtype:
                    target.addmm_(shrunk, part.b)  # product and sum in one
                    return
            else:
                target = output.view(batch, width, -1)[:, first:]
            target.add_(shrunk @ part.b)

        return add

    def _stack(self) -> None:
        """Stack what is known to read one input."""
        self._stacked = True
        for names in self.groups or ():
            parts = [self._parts[name] for name in names]
            if _stackable(parts):  # the model may have been moved since they were found
                _Group(parts)

    def _shrunk(self, part: _Part, x: Tensor, rows: tuple[int, int, int]) -> Tensor:
        """x @ a^T of the gated rows: [width - first, r] in a batch of 1, else [B, ., r]."""
        seen = self._seen
        if x.is_inference():  # nobody would tell if it were changed between two modules
            return _product(part.a, x, rows)
        if self.groups is None:
            self._look(part, x)
        elif not self._stacked:
            self._stack()
        group = part.group
        if group is None:
            return _product(part.a, x, rows)
        # every opening of the gate has a tuple of its own: nothing outlives its forward
        same = seen.x is x and seen.version == x._version and seen.rows is rows
        if same and seen.group is group:
            assert seen.product is not None
            return seen.product[..., part.columns]
        if part is not group.first:
            return _product(part.a, x, rows)
        product = _product(group.stack, x, rows)
        seen.x, seen.version, seen.rows = x, x._version, rows
        seen.group, seen.product = group, product
        return product[..., part.columns]

    def _look(self, part: _Part, x: Tensor) -> None:
        """Note which modules read one input, until the second forward begins."""
        seen = self._seen
        if any(part in run for run in seen.runs):
            seen.x = None
            runs, seen.runs = seen.runs, []
            names = [tuple(part.name for part in run) for run in runs if _stackable(run)]
            self.groups = tuple(names)
            self._stack()
            return
        if seen.runs and seen.x is x and seen.version == x._version:
            seen.runs[-1].append(part)
        else:
            seen.runs.append([part])
        seen.x, seen.version, seen.group = x, x._version, None


def _stackable(parts: list[_Part]) -> bool:
    kinds = {(part.a.dtype, part.a.device) for part in parts}
    return len(parts) > 1 and len(kinds) == 1


def _product(a: Tensor, x: Tensor, rows: tuple[int, int, int]) -> Tensor:
    """x @ a^T of the gated rows."""
    first, batch, width = rows
    gated = x.reshape(width, -1)[first:] if batch == 1 else x.reshape(batch, width, -1)[:, first:]
    return torch.nn.functional.linear(gated.to(a.dtype), a)
