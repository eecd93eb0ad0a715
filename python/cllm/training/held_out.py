"""Evaluation in the training loop: held-out prompts over all processes, measured against the base
model, whose own texts are made once."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..adapter import GatedAdapter
from ..decoding import JacobiConfig
from ..evaluation import (
    DecodedText,
    Evaluation,
    base_model,
    decode_texts,
    encode_prompts,
    negative_log_likelihoods,
    summarise,
)
from .lora import is_peft

# where neither settings nor trajectories name one: the same on every device
_BLOCK_SIZE = 16


class HeldOut:
    """Held-out prompts, the base model that judges, and what the base model itself makes of them.

    Args:
        model: as it is before training.
        tokenizer: encodes and pads.
        prompts: `Prompt`, text or token ids.
        args: `ConsistencyTrainingArguments`.
        base: the judge; None: a copy of `model`, or for a PEFT model the model without adapters.
        dataset: the trajectories; their manifest says n.
        sharded: whether the weights will be spread over processes: then a part of the model cannot
            be run by itself, and a PEFT model is judged by a copy without adapters, too.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Any],
        args: Any,
        base: Any,
        dataset: Any,
        *,
        sharded: bool = False,
    ):
        if tokenizer is None:
            raise ValueError("evaluation needs the tokenizer; give processing_class")
        self._tokenizer = tokenizer
        self._prompts = encode_prompts(model, tokenizer, prompts)
        self._gated = bool(args.gated)
        manifest = getattr(dataset, "manifest", None)
        block = args.eval_block_size or getattr(manifest, "block_size", None)
        self._settings: dict[str, Any] = {
            # captures would keep memory that training needs
            "config": JacobiConfig(
                block_size=block or _BLOCK_SIZE, seed=args.seed, lookup=0, compile="off"
            ),
            "max_new_tokens": args.eval_max_new_tokens,
            "batch_size": args.per_device_eval_batch_size,
        }
        if base is None and (sharded or not is_peft(model)):
            base = copy.deepcopy(model)
            base = base.unload() if is_peft(base) else base
        if base is not None:
            base = base.eval().requires_grad_(False).to(args.device)
        self._base = base
        self.base_result: Evaluation | None = None
        self._base_nll: list[float] = []

    def __len__(self) -> int:
        return len(self._prompts)

    def prepare(self, trainer: Any) -> None:
        """Measure the base model, unless that was done."""
        if self.base_result is not None:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        with base_model(model, self._base) as judge:
            texts, seconds = self._decode(trainer, judge)
            self._base_nll = self._score(trainer, judge, [text.tokens for text in texts])
        references = [text.tokens for text in texts]
        self.base_result = summarise(texts, references, self._base_nll, self._base_nll, seconds)

    def measure(self, trainer: Any) -> Evaluation:
        """Decode the prompts with the model as it is now."""
        self.prepare(trainer)
        assert self.base_result is not None
        model = trainer.accelerator.unwrap_model(trainer.model)
        adapter = None
        if self._gated:  # the base model decodes, the adapter as it is now only guesses
            adapter = GatedAdapter.from_peft(model, metadata={"gated": True})
        texts, seconds = self._decode(trainer, model, adapter)
        with base_model(model, self._base) as judge:
            nll = self._score(trainer, judge, [text.tokens for text in texts])
        return summarise(texts, self.base_result.responses, nll, self._base_nll, seconds)

    def state(self) -> dict[str, Any] | None:
        """What the base model did, JSON-serialisable, for a checkpoint."""
        if self.base_result is None:
            return None
        return {
            "key": self._key(),
            "result": asdict(self.base_result),
            "nll": self._base_nll,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take up what `state` gave, unless prompts or settings have changed since."""
        if state is not None and state["key"] == self._key():
            self.base_result = Evaluation(**state["result"])
            self._base_nll = list(state["nll"])

    def _key(self) -> str:
        config = asdict(self._settings["config"])
        content = [self._prompts, config, self._settings["max_new_tokens"]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _decode(
        self, trainer: Any, model: Any, adapter: GatedAdapter | None = None
    ) -> tuple[list[DecodedText], float]:
        start = time.perf_counter()
        # the noise of training must not depend on how often it is interrupted by an evaluation
        with torch.random.fork_rng():
            texts = _over_processes(
                trainer,
                range(len(self._prompts)),
                lambda rows: decode_texts(
                    model,
                    self._tokenizer,
                    [self._prompts[row] for row in rows],
                    adapter=adapter,
                    **self._settings,
                ),
            )
        return texts, time.perf_counter() - start

    def _score(self, trainer: Any, judge: Any, responses: Sequence[Sequence[int]]) -> list[float]:
        return _over_processes(
            trainer,
            range(len(self._prompts)),
            lambda rows: negative_log_likelihoods(
                judge,
                [self._prompts[row] for row in rows],
                [responses[row] for row in rows],
                self._settings["batch_size"],
            ),
        )


def _over_processes(trainer: Any, rows: Sequence[int], work: Any) -> list[Any]:
    """Results of ``work(rows)`` in the order of the rows, every process doing its share.

    Sharded weights are gathered in every forward, so there all processes do all of the work.
    """
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return list(work(list(rows)))
    from accelerate.utils import gather_object

    own = list(rows)[accelerator.process_index :: accelerator.num_processes]
    found = list(zip(own, work(own), strict=True)) if own else []
    return [value for _, value in sorted(gather_object(found), key=lambda pair: pair[0])]
