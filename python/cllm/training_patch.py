"""Patch a model instance so that its own ``forward`` computes the loss of consistency training.

One instance attribute, ``forward``, hides the method of the class. Everything around the module
(DistributedDataParallel, FSDP2, gradient checkpointing, `torch.compile`, PEFT, any training loop)
sees a forward and a loss.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from .head import LanguageHead, takes
from .training.clean_cache import CleanCache
from .training.config import ConsistencyConfig
from .training.gate import AdapterGate
from .training.loss import packed_loss
from .training.masks import check_attention
from .training.probe import check_gated_forward, check_packed_forward
from .training.teachers import (
    AdapterOffTeacher,
    FrozenTeacher,
    Teacher,
    trains_adapter_only,
)
from .traits import UnsupportedModelError, mask_kinds, unwrapped

_HANDLE = "_cllm_training_handle"


class TrainingHandle:
    """Consistency training on one model instance; `remove` takes it off.

    Attributes:
        model: the transformers model whose forward is patched (what PEFT or DDP wrap).
        config: the settings in force.
    """

    def __init__(self, model: Any, config: ConsistencyConfig, gate: AdapterGate | None = None):
        self.model = model
        self.config = config
        self._head = LanguageHead.of(model)
        self._kinds = mask_kinds(type(model).__name__, model.config.get_text_config())
        self._hidden = model.__dict__.get("forward")
        self._on = True
        self._gate = gate
        self._copy: FrozenTeacher | None = None
        if gate is not None:  # the clean columns are the base model
            return
        if config.teacher == "base" and not trains_adapter_only(model):
            self._copy = FrozenTeacher(model)
        elif config.teacher == "ema":
            self._copy = FrozenTeacher(model, config.ema_decay)

    @property
    def active(self) -> bool:
        """Whether the model still carries this patch."""
        return self._on and self.model.__dict__.get(_HANDLE) is self

    def teacher(self) -> Teacher | None:
        """Who teaches at present; None: the model itself (in gated training, its clean columns,
        which are the base model).

        An adapter that was put into the model after the patch is taken into account: the base
        model's copy is given up for the model without its adapter.
        """
        if self.config.teacher == "self" or self._gate is not None:
            return None
        if self.config.teacher == "base":
            if trains_adapter_only(self.model):
                self._copy = None
                return AdapterOffTeacher()
            return self._copied()
        return self._average()

    def update_teacher(self) -> None:
        """Take one step of the ``"ema"`` teacher's average: call it after each optimiser step.
        Other teachers have nothing to update."""
        if self.config.teacher == "ema":
            self._average().update(self.model)

    def teacher_state_dict(self) -> dict[str, torch.Tensor]:
        """What of the teacher the model's own checkpoint does not hold; empty if nothing."""
        teacher = self.teacher()
        return teacher.state_dict() if isinstance(teacher, FrozenTeacher) else {}

    def load_teacher_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `teacher_state_dict` gave, to go on with a training.

        Raises:
            ValueError: a state of another model, or of another kind of teacher.
        """
        teacher = self.teacher()
        if isinstance(teacher, FrozenTeacher):
            teacher.load_state_dict(state)
        elif state:
            raise ValueError(
                f"the teacher {self.config.teacher!r} of this model keeps no state of its own; the "
                "checkpoint is of a training with another teacher"
            )

    def remove(self) -> None:
        """Restore the model's own ``forward``. Removing twice, or a replaced patch, does
        nothing."""
        if not self.active:
            return
        self._on = False
        self._copy = None
        if self._gate is not None:
            self._gate.remove()
        own = self.model.__dict__
        if getattr(own.get("forward"), "__func__", None) is not own[_HANDLE]._function:
            return  # somebody wrapped our forward since; it now passes every call on
        del own[_HANDLE], own["forward"]
        if self._hidden is not None:
            own["forward"] = self._hidden

    def _copied(self) -> FrozenTeacher:
        if self._copy is None:
            raise ValueError(
                "teacher='base' has no copy of the base model: the adapter that it was to be read "
                "from is gone, or other weights are trained beside it; patch again"
            )
        return self._copy

    def _average(self) -> FrozenTeacher:
        if self._copy is None or not self._copy.matches(self.model):
            self._copy = FrozenTeacher(self.model, self.config.ema_decay)
        return self._copy

    def _install(self) -> None:
        own_forward = type(self.model).forward

        # the signature is the class's, which generate and trainers look at
        @functools.wraps(own_forward)
        @torch.compiler.disable(recursive=False)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            handle = model.__dict__.get(_HANDLE)
            if handle is None or not handle._on or kwargs.get("segment_ids") is None:
                hidden = None if handle is None else handle._hidden
                return (hidden or types.MethodType(own_forward, model))(*args, **kwargs)
            return handle._loss(args, kwargs)

        self._function = forward
        # a bound method, so that a deep copy of the model is bound to the copy
        self.model.__dict__["forward"] = types.MethodType(forward, self.model)
        self.model.__dict__[_HANDLE] = self

    def _loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:
            raise ValueError("a packed batch is given by name: model(**batch)")
        batch = dict(kwargs, input_ids=args[0]) if args else kwargs
        if self._head.model is not self.model:  # a deep copy of the model, and of this handle
            self._head = self._head.of_copy(self.model)
        output = packed_loss(
            self._head, self.config, self._kinds, self.teacher(), batch, self._gate
        )
        return output.to_tuple() if kwargs.get("return_dict") is False else output


def patch_training(model: Any, config: ConsistencyConfig | None = None) -> TrainingHandle:
    """Make ``model(**batch)`` compute the loss of consistency training (CLLM, arXiv 2403.00835).

    A call with `segment_ids`, which batches of `cllm.training.packing.ConsistencyCollator` carry,
    returns a `ConsistencyOutput` with `loss`, `consistency_loss`, `ar_loss` and `tokens`. Any other
    call is the model's own. Patching a patched model replaces the settings.

    Args:
        model: a causal language model of transformers, possibly in PEFT, DistributedDataParallel
            or `torch.compile`; it may be wrapped in them later too. Patch before FSDP2 shards it.
        config: settings; the defaults of `ConsistencyConfig` if None. With ``gated=True`` the model
            must have its LoRA adapters already; until the patch is removed they work in the noisy
            columns of packed batches and nowhere else.

    Returns:
        A handle; ``handle.remove()`` undoes the patch.

    Raises:
        UnsupportedModelError: if the model's forward does not give, on a small packed row, what it
            gives on the same texts one by one, or its head cannot be used by itself; with
            ``gated=True`` if there are no adapters, or not such that can be gated.
    """
    model = unwrapped(model)
    name = type(model).__name__
    if getattr(model, "config", None) is not None:  # else the head says what is amiss
        check_attention(model.config.get_text_config()._attn_implementation)
    head = LanguageHead.of(model)
    text = model.config.get_text_config()
    if not takes(unwrapped(head.decoder), "position_ids") or getattr(text, "alibi", False):
        raise UnsupportedModelError(
            f"{name} reads positions off the keys' places, which packed samples share; "
            "consistency training needs a model that takes position_ids"
        )
    config = config or ConsistencyConfig()
    bound = check_packed_forward(head, mask_kinds(name, text))
    gate = None
    if config.gated:
        gate = AdapterGate(model)
        try:
            check_gated_forward(head, mask_kinds(name, text), gate, bound)
        except BaseException:
            gate.remove()
            raise
        if config.clean_cache_gib:
            gate.texts = CleanCache(int(config.clean_cache_gib * 2**30))
    current = model.__dict__.get(_HANDLE)
    if current is not None:
        current.remove()
    handle = TrainingHandle(model, config, gate)
    handle._install()
    return handle
