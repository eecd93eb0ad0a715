"""The ragged KV cache: every row of the batch has its own length, and can be rewound for free.

A row's keys and values stand at slots ``0 .. length - 1`` of preallocated storage. A window is
written behind them at each forward; what was a wrong guess is simply overwritten by the next one,
because only the masks and the positions know how long a row is. HuggingFace's own caches keep one
length for the whole batch, so rows could not advance at their own pace.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .storage import Storage, moved

# SDPA on CPU reduces over keys in blocks of 512, in order, and a masked block adds exact zeros. So
# views that are multiples of 512 give a row the same bits.
VIEW_STEP = 512
_ALIGNMENT = 64


def round_up(count: int, step: int) -> int:
    return -(-count // step) * step


class BlockPlan:
    """Where the block of the coming forward is written, and what attention gets to see.

    One plan is shared by all layers, so that indices are computed once per forward.

    A row's bits must not depend on how the text came about, or near-ties in bf16 would fall
    differently from one trajectory to the next. The slots that attention reduces over are part of
    that: matrix products block a sum by its length. So a call keeps one view as long as its text
    can, and beyond `VIEW_STEP` slots grows it in whole steps; attention that promises nothing about
    its blocks (`constant_view`) has the whole view from the start.

    Args:
        batch: B, the rows.
        slots: most slots that a row of this call can need, the last window included.
        right_aligned: hand every row to attention with its newest token in the last slot, as a
            left-padded batch, for models that read positions off a 2D mask (ALiBi) or off the
            key's distance from the end. Costs a gather of the whole cache per layer.
        constant_view: never grow the view.
        handed: layers hand the block and their storage to attention as they are, which appends
            the one to the other (`cllm_kernels.block_attention`); nothing is copied or masked.
        native: whole decoder layers do that (`layers.NativeLayer`), guess rows included.
        storage: that all layers have theirs of, of a cache that never grows.
    """

    def __init__(
        self,
        batch: int,
        slots: int,
        device: torch.device,
        *,
        right_aligned: bool = False,
        constant_view: bool = False,
        handed: bool = False,
        native: bool = False,
        storage: Storage | None = None,
    ):
        self.storage = storage
        self.indexed = False  # slots are a tensor even where a slice would do
        self.batch = batch
        self.grows = slots > VIEW_STEP and not constant_view
        self.longest_view = round_up(slots, VIEW_STEP if self.grows else _ALIGNMENT)
        self.capacity = VIEW_STEP if self.grows else self.longest_view
        self.device = device
        self.right_aligned = right_aligned
        self.handed = handed or native
        self.native = native
        self.lengths: torch.Tensor | None = None  # [B] where each row's block begins
        self._offer: tuple[torch.Tensor, torch.Tensor, RaggedLayer] | None = None
        self.prefill = True
        self.view = 0  # slots of a row that attention sees
        self.single = 0  # where the block starts, when there is one row and the host knows it
        self.slots: torch.Tensor | None = None  # [B * n] flat index of every token of the block
        self.gather: torch.Tensor | None = None  # [B * view] flat index of every visible slot
        self.width = 0
        self.guesses_from: int | None = None  # first row behind the block's first chain
        self.guess_width: int | None = None  # rows of every other one, None: all that are left
        self.unsure_from: int | None = None  # first row that may be garbage

    def start_prefill(self, width: int) -> None:
        self.prefill, self.width, self.view = True, width, width
        self.guesses_from = self.guess_width = self.unsure_from = None
        self.reserve(width)

    def start_window(
        self,
        lengths: torch.Tensor,
        host_lengths: list[int],
        width: int,
        guesses_from: int | None = None,
        guess_width: int | None = None,
        unsure_from: int | None = None,
    ) -> None:
        """Plan a forward of `width` rows behind `lengths` [B] (`host_lengths`: the same on the
        host).

        Rows from `guesses_from` on begin at ``lengths`` again, every `guess_width` of them as a
        chain of their own; None: all that are left. Those from `unsure_from` on are guesses of an
        adapter, which may be garbage, see `finite_guesses`.
        """
        self.prefill, self.width = False, width
        self.guesses_from, self.guess_width = guesses_from, guess_width
        self.unsure_from = unsure_from
        longest = max(host_lengths)
        self.reserve(longest + width)
        self.single = host_lengths[0]
        self.lengths = lengths
        if self.handed:
            self.view = width
            return
        offsets = torch.arange(width, device=self.device)
        rows = torch.arange(self.batch, device=self.device)[:, None] * self.capacity
        if self.indexed or self.batch > 1 or self.device.type != "cpu":
            self.slots = (rows + lengths[:, None] + offsets).flatten()
        if self.right_aligned:
            self.view = longest + width
            shift = (longest - lengths)[:, None]
            visible = torch.arange(self.view, device=self.device) - shift
            self.gather = (rows + visible.clamp_(min=0)).flatten()
        else:
            self.view = round_up(longest + width, VIEW_STEP) if self.grows else self.longest_view

    def reserve(self, slots: int) -> None:
        """Make room for `slots` per row, doubling so that growth stays rare."""
        if slots > self.capacity:
            wanted = min(max(slots, 2 * self.capacity), self.longest_view)
            self.capacity = round_up(wanted, VIEW_STEP)

    def offer(self, keys: torch.Tensor, values: torch.Tensor, layer: RaggedLayer) -> None:
        """A layer's block [B, heads, n, D], for attention to take."""
        self.check_taken()
        self._offer = keys, values, layer

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The storage [B, heads, capacity, D] that belongs to the block just offered."""
        offer, self._offer = self._offer, None
        if offer is None or keys is not offer[0] or values is not offer[1]:
            raise RuntimeError("attention was given other keys than its cache layer returned")
        stored_keys, stored_values = offer[2].stored()
        return stored_keys.transpose(1, 2), stored_values.transpose(1, 2)

    def check_taken(self) -> None:
        """Raises RuntimeError if a layer's block was never taken, and so is not in the cache."""
        if self._offer is not None:
            raise RuntimeError("a layer's attention did not take the block of its cache layer")

    def key_mask(self, lengths: torch.Tensor) -> torch.Tensor:
        """[B, view] of 0 and 1, the 2D attention mask of the right-aligned layout."""
        first = (lengths.max() - lengths)[:, None]
        return (torch.arange(self.view, device=self.device) >= first).long()


# Entries of a guess row's keys or values beyond so many times the largest of the verify rows' are
# no guess any more.
_LARGEST = 4.0


def finite_guesses(states: torch.Tensor, first: int) -> torch.Tensor:
    """Keys or values of a gated block, with those of guess rows made harmless.

    A mask gives a slot the weight 0, but 0 * NaN is NaN, and so is inf - inf in the scores. So NaN
    becomes 0 and the rest is clamped to a few times the largest entry among the row's own verify
    rows, with which scores do not overflow if the base model's do not. Values too: of a compressed
    cache (multi-head latent attention) they are part of the keys.

    Args:
        states: [B, heads, v + n, D].
        first: v; the rows before it keep their bits.
    """
    verified, guessed = states[:, :, :first], states[:, :, first:]
    if states.is_cpu:  # to look first is cheap where nobody has to wait for the answer
        norm = torch.linalg.vector_norm
        found, bound = (norm(part, torch.inf, dim=(1, 2, 3)) for part in (guessed, verified))
        if bool((found / _LARGEST <= bound).all()):  # False for NaN, and nothing overflows
            return states
    largest = verified.abs().amax(dim=(1, 2, 3), keepdim=True) * _LARGEST
    guessed = guessed.clamp(min=-largest, max=largest).nan_to_num_(nan=0.0)
    return torch.cat([verified, guessed], dim=2)


class RaggedLayer(CacheLayerMixin):
    """One layer's storage: keys [B, capacity, heads, D_k] and values [B, capacity, heads, D_v].

    The token dimension stands before the heads, so that a block is appended to all heads of a
    ragged batch by one indexed copy.
    """

    is_sliding = False

    def __init__(self, plan: BlockPlan):
        super().__init__()
        self.plan = plan
        self.updates = 0
        self.storage: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any
    ) -> None:
        # zeros, not empty: a masked slot still takes part in a product with weight 0, and 0 * NaN
        # is NaN
        self.storage = self._allocate("keys", key_states), self._allocate("values", value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _allocate(self, kind: str, states: torch.Tensor) -> torch.Tensor:
        if self.plan.storage is not None:
            return self.plan.storage.take(kind, states, self.plan.capacity)
        batch, heads, _, size = states.shape
        return states.new_zeros(batch, self.plan.capacity, heads, size)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the block's keys and values [B, heads, n, D]; return all that attention sees."""
        if self.plan.native and not self.plan.prefill:
            raise RuntimeError("a decoder layer's own forward ran over a window of native layers")
        if self.storage is None:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._with_room()
        if self.plan.handed and not self.plan.prefill:
            self.plan.offer(key_states, value_states, self)
            return key_states, value_states
        first = self.plan.unsure_from
        if first is not None:
            key_states = finite_guesses(key_states, first)
            value_states = finite_guesses(value_states, first)
        self._write(keys, key_states)
        self._write(values, value_states)
        if self.plan.prefill:
            return key_states, value_states
        return self._visible(keys), self._visible(values)

    def _with_room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The storage, as large as the plan asks for by now."""
        assert self.storage is not None
        self.updates += 1
        keys, values = self.storage
        self.storage = keys, values = self._grown(keys), self._grown(values)
        # under the names by which HuggingFace's own code finds a layer's tensors
        self.keys, self.values = keys, values
        return keys, values

    def for_window(
        self, heads: int, size: int, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, capacity, D] that a native layer reads and writes itself, of
        the dtype and device of `like`."""
        if self.storage is None:
            empty = like.new_empty(self.plan.batch, heads, 0, size)
            self.lazy_initialization(empty, empty)
        keys, values = self._with_room()
        return keys.transpose(1, 2), values.transpose(1, 2)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the tokens of slots `source` [B, m] to slots `target` [B, m]."""
        for storage in self.stored():
            moved(storage, source, target)

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The storage, keys and values."""
        assert self.storage is not None
        return self.storage

    def _grown(self, storage: torch.Tensor) -> torch.Tensor:
        capacity = self.plan.capacity
        if storage.shape[1] >= capacity:
            return storage
        grown = storage.new_zeros(storage.shape[0], capacity, *storage.shape[2:])
        grown[:, : storage.shape[1]] = storage
        return grown

    def _write(self, storage: torch.Tensor, states: torch.Tensor) -> None:
        plan = self.plan
        block = states.transpose(1, 2)  # [B, n, heads, D]
        if plan.prefill:
            storage[:, : plan.width] = block
        elif plan.slots is None:
            storage[0, plan.single : plan.single + plan.width] = block[0]
        else:
            slots = plan.slots.to(storage.device)
            storage.view(-1, *storage.shape[2:]).index_copy_(0, slots, block.flatten(0, 1))

    def _visible(self, storage: torch.Tensor) -> torch.Tensor:
        plan = self.plan
        if plan.gather is not None:
            flat = storage.view(-1, *storage.shape[2:])
            seen = flat.index_select(0, plan.gather.to(storage.device))
            return seen.view(plan.batch, plan.view, *storage.shape[2:]).transpose(1, 2)
        return storage[:, : plan.view].transpose(1, 2)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.plan.view, 0

    def get_seq_length(self, *args: Any) -> int:
        if self.plan.prefill:
            return 0
        # rows differ, so that no number is right: a model that goes by it, not by the positions
        # that it is given, has to be far off when it is probed
        slots = self.plan.longest_view if self.plan.handed else self.plan.view
        return slots - self.plan.width

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """What `get_max_length` was called before transformers 5.20 or so."""
        return -1


class RaggedCache(Cache):
    """A HuggingFace cache of `RaggedLayer`, created layer by layer as the model writes to it."""

    def __init__(self, plan: BlockPlan):
        # called without arguments for every layer that the model turns out to have
        super().__init__(layer_class_to_replicate=partial(RaggedLayer, plan))  # type: ignore[arg-type]
        self.plan = plan
        self.stack: Any = None  # `stack.LayerStack` of native layers over this cache

    def layer(self, index: int) -> RaggedLayer:
        """The layer of this index, made where it is not there yet."""
        while len(self.layers) <= index:
            self.layers.append(RaggedLayer(self.plan))
        layer = self.layers[index]
        assert isinstance(layer, RaggedLayer)
        return layer

    @property
    def ragged(self) -> list[RaggedLayer]:
        """All layers there are."""
        return [layer for layer in self.layers if isinstance(layer, RaggedLayer)]

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """`RaggedLayer.move` in all layers."""
        whole = None if self.plan.storage is None else self.plan.storage.whole
        if whole is not None:
            for storage in whole:
                moved(storage, source, target)
            return
        for layer in self.ragged:
            layer.move(source, target)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' storage."""
        return sum(tensor.nbytes for layer in self.ragged for tensor in layer.stored())

    def untouched_layers(self) -> list[int]:
        """Layers of the cache that no forward has written to."""
        return [
            index
            for index, layer in enumerate(self.layers)
            if not (isinstance(layer, RaggedLayer) and layer.updates)
        ]
