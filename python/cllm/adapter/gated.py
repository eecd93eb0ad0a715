"""`GatedAdapter`: the weights of guess rows, where they come from, and how a model gets them."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..linears import add_term, fusable
from ..traits import unwrapped
from .errors import AdapterError
from .fingerprint import base_fingerprint
from .gate import Gate
from .low_rank import Casts, LowRankRows
from .peft_format import find_folder, read_folder, write_folder
from .peft_model import adapters_off, live_weights
from .weights import LowRank, base_layer, check_target, linear_targets

FORMAT = 1
# where `training_patch` keeps its handle; read, never written
_TRAINING_HANDLE = "_cllm_training_handle"


class GatedAdapter:
    """Low-rank weights that a model gets in some rows of a forward, and in no other.

    The weights are never merged, and the model's own are never touched: the rows outside of the
    gate have the bits of the base model's forward.

    Args:
        weights: module name (as in ``model.named_modules()`` of the plain model) to its weights.
        metadata: what ``cllm_adapter.json`` holds: ``gated`` (trained with the gate),
            ``base_model`` (name), ``base_fingerprint`` (`base_fingerprint` of it), ``block_size``
            and whatever else says how it was made. JSON values only.

    Attributes:
        weights, metadata: as given.

    Raises:
        AdapterError: no weights at all, or two matrices that do not belong together.
    """

    def __init__(self, weights: Mapping[str, LowRank], metadata: Mapping[str, Any] | None = None):
        if not weights:
            raise AdapterError("the adapter has no weights")
        for name, pair in weights.items():
            pair.check(name)
        self.weights = dict(weights)
        self.metadata = dict(metadata or {})
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()
        # of modules that read one input, see `LowRankRows`
        self._groups: weakref.WeakKeyDictionary[Any, tuple[tuple[str, ...], ...]]
        self._groups = weakref.WeakKeyDictionary()
        self._casts: Casts = {}
        self._warned = False
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or pickle: what it was made of, not what it has seen of models since."""
        return {"weights": self.weights, "metadata": self.metadata}

    def __setstate__(self, state: dict[str, Any]) -> None:
        GatedAdapter.__init__(self, **state)

    @classmethod
    def load(cls, source: str | Path) -> GatedAdapter:
        """Read an adapter in PEFT's format: a folder, or a repository of the hub (owner/name).

        PEFT is not needed. Only safetensors are read, no pickles.

        Raises:
            AdapterError: there is no adapter, it is more than plain LoRA on linear layers (DoRA,
                biases, whole modules, embeddings), a file is damaged, or weights are NaN or
                infinite; the message names the tensor.
        """
        adapter = cls(*read_folder(find_folder(source)))
        adapter._check_finite()
        return adapter

    @classmethod
    def from_peft(
        cls,
        model: Any,
        adapter_name: str | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> GatedAdapter:
        """The LoRA weights of a PEFT model, as they are at each use: tensors are shared.

        Args:
            model: a PEFT model, or a transformers model with an adapter added to it.
            adapter_name: None: the active one.
            metadata: None: what can be known from the model (its name; gated, if it is being
                trained with the gate).

        Raises:
            AdapterError: no LoRA layers (merged and unloaded), merged weights, several active
                adapters, or more than plain LoRA.
        """
        weights, _ = live_weights(model, adapter_name)
        if metadata is None:
            base = unwrapped(model)
            training = base.__dict__.get(_TRAINING_HANDLE)
            gated = bool(getattr(getattr(training, "config", None), "gated", False))
            metadata = {"gated": gated, "base_model": base.config.name_or_path or None}
        return cls(weights, metadata)

    @classmethod
    def random(
        cls,
        model: Any,
        rank: int,
        *,
        targets: str | tuple[str, ...] | list[str] = "all-linear",
        scale: float = 0.02,
        seed: int = 0,
    ) -> GatedAdapter:
        """An untrained adapter for `model`: both matrices normal with standard deviation `scale`.

        Good for proofs (any weights must leave the text alone) and to measure costs.

        Args:
            targets: ``"all-linear"`` (every linear layer but the output embedding), or ends of
                module names: ``("q_proj", "v_proj")``.

        Raises:
            AdapterError: no module has one of these names. ValueError: rank < 1.
        """
        if rank < 1:
            raise ValueError(f"rank must be >= 1, not {rank}")
        base = unwrapped(model)
        generator = torch.Generator("cpu").manual_seed(seed)
        weights = {}
        for name, module, shape in linear_targets(base):
            if targets != "all-linear" and not any(
                name == end or name.endswith(f".{end}") for end in targets
            ):
                continue
            weight: Any = base_layer(module).weight
            a = torch.randn(rank, shape[0], generator=generator, device="cpu") * scale
            b = torch.randn(shape[1], rank, generator=generator, device="cpu") * scale
            weights[name] = LowRank(a.to(weight), b.to(weight), 1.0)
        if not weights:
            raise AdapterError(f"{type(base).__name__} has no linear layer called {targets!r}")
        metadata = {
            "gated": True,
            "base_model": base.config.name_or_path or None,
            "base_fingerprint": base_fingerprint(base),
        }
        return cls(weights, metadata)

    @property
    def parameters(self) -> int:
        """How many numbers the adapter has."""
        return sum(pair.a.numel() + pair.b.numel() for pair in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, in the dtype they were loaded in."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.weights.values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({pair.rank for pair in self.weights.values()}))

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write PEFT's format and ``cllm_adapter.json``.

        Args:
            folder: made where missing.
            dtype: of the written weights; None: as they are.

        Returns:
            The folder.
        """
        metadata = {"format": FORMAT, **self.metadata}
        write_folder(Path(folder), self.weights, metadata, dtype)
        return Path(folder)

    def check(self, model: Any) -> None:
        """Whether this adapter belongs to `model`; done once for each model.

        The base's fingerprint is compared where the metadata has one and the model is not in fp16
        (whose values have been rounded once more, see `base_fingerprint`). An adapter that does not
        say that it was trained with the gate gets one warning: only speed can suffer.

        Raises:
            AdapterError: weights that are NaN or infinite, for a module that `model` has not, of
                other shapes, for another base by its fingerprint; a quantised base.
        """
        base = unwrapped(model)
        with self._lock:
            if base in self._checked:
                return
            self._check_finite()
            _refuse_quantised(base)
            for name, pair in self.weights.items():
                check_target(base, name, pair)
            self._check_fingerprint(base)
            self._checked.add(base)
            if self.metadata.get("gated") is not True and not self._warned:
                self._warned = True
                warnings.warn(
                    "the adapter does not say that it was trained with the gate; the text is the "
                    "base model's all the same, but fewer guesses may be right",
                    stacklevel=2,
                )

    def _check_finite(self) -> None:
        for name, pair in self.weights.items():
            pair.check_finite(name)

    def _check_fingerprint(self, base: Any) -> None:
        expected = self.metadata.get("base_fingerprint")
        if expected is None or base.dtype == torch.float16:
            return
        found = base_fingerprint(base)
        if found != expected:
            name = self.metadata.get("base_model") or "another model"
            raise AdapterError(
                f"the adapter was trained for other weights ({name}, fingerprint "
                f"{str(expected)[:12]}) than this {type(base).__name__} has ({found[:12]}): "
                "another or a fine-tuned base, or one that an adapter was merged into"
            )

    @contextmanager
    def applied(self, model: Any) -> Iterator[Gate]:
        """Put the adapter behind a gate of `model`, for a while.

        Meanwhile PEFT adapters that the model itself carries are off. Every module of the adapter
        adds the low-rank term to the gated rows while the gate is open: plain linear layers by
        `cllm.linears.add_term`, all others by a forward hook. Weights are cast once, when
        they are first needed: to the modules' dtype, to be added on a CPU to fp32 at least.

        Yields:
            The `Gate`, closed. It is open for the thread that opens it only, so that other threads
            may run the model meanwhile.

        Raises:
            AdapterError: as `check`.
        """
        self.check(model)
        base = unwrapped(model)
        gate = Gate()
        rows = LowRankRows(gate, self._groups.get(base))
        with adapters_off(base), ExitStack() as stack:
            for name, pair in self.weights.items():
                module = base.get_submodule(name)
                like: Any = base_layer(module).weight
                if fusable(module):
                    stack.callback(add_term(module, rows.term(self._casts, name, pair, like)))
                else:
                    hook = module.register_forward_hook(rows.hook(name, pair, like))
                    stack.callback(hook.remove)
            try:
                yield gate
            finally:
                if rows.groups is not None:
                    self._groups[base] = rows.groups

    def __repr__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return (
            f"GatedAdapter({len(self.weights)} modules, rank {ranks}, {self.parameters} parameters)"
        )


@lru_cache(maxsize=2)
def _loaded(folder: Path, files: tuple[tuple[str, int], ...]) -> GatedAdapter:
    """The adapter in a folder whose files, with their times, are these."""
    return GatedAdapter.load(folder)


def resolve_adapter(adapter: Any) -> GatedAdapter:
    """What the ``adapter`` of `cllm.generate` and `cllm.patch` stands for.

    Args:
        adapter: a `GatedAdapter`, a folder or hub id, or a model with a PEFT adapter. The two
            folders last used are kept in memory, as long as their files do not change.

    Raises:
        AdapterError: as `GatedAdapter.load` and `GatedAdapter.from_peft`.
        TypeError: anything else.
    """
    if isinstance(adapter, GatedAdapter):
        return adapter
    if isinstance(adapter, (str, Path)):
        folder = find_folder(adapter)
        files = tuple((path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()))
        return _loaded(folder.resolve(), files)
    if isinstance(adapter, torch.nn.Module):
        return GatedAdapter.from_peft(adapter)
    raise TypeError(
        f"adapter must be a GatedAdapter, a folder, a hub id or a PEFT model, not "
        f"{type(adapter).__name__}"
    )


def _refuse_quantised(model: Any) -> None:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise AdapterError(
            f"{type(model).__name__} is quantised; a gated adapter needs plain floating-point "
            "weights, load the base without quantization_config"
        )
