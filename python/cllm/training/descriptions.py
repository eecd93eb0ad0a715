"""The files that say how a model in a folder was made, beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapter import base_fingerprint
from ..adapter.gated import FORMAT
from ..adapter.peft_format import METADATA
from ..traits import unwrapped
from .checkpoints import RECIPE_FILE, write_json
from .store import versions

_RECORDED = ("cllm-kernels", "torch", "transformers", "accelerate", "peft", "tokenizers")


def save_descriptions(trainer: Any, folder: str) -> None:
    """Write ``generation_config.json`` and ``cllm_recipe.json``; for gated adapters
    ``cllm_adapter.json``, by which gated decoding knows them and their base.

    Args:
        trainer: the `ConsistencyTrainer` whose model is in `folder`.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    manifests = getattr(trainer.trajectories, "manifests", [])
    content = {
        "arguments": trainer.args.to_dict(),
        "recipe": trainer.recipe,
        "trajectories": [manifest.to_json() for manifest in manifests],
        "versions": versions(_RECORDED),
        "step": trainer.state.global_step,
        "trained": trainer.meter.state(),
    }
    write_json(Path(folder) / RECIPE_FILE, content)
    if trainer.args.gated:
        write_json(Path(folder) / METADATA, _gated_metadata(trainer, unwrapped(model)))


def _gated_metadata(trainer: Any, base: Any) -> dict[str, Any]:
    """What `cllm.GatedAdapter` reads.

    Args:
        base: the transformers model, whose own weights are what the adapter belongs to.
    """
    sizes = [manifest.block_size for manifest in getattr(trainer.trajectories, "manifests", [])]
    counts = trainer.meter.total
    return {
        "format": FORMAT,
        "gated": True,
        "base_model": trainer.recipe.get("model") or base.config.name_or_path or None,
        "base_fingerprint": base_fingerprint(base),
        "block_size": max(sizes, default=None),
        "step": trainer.state.global_step,
        "noisy_tokens": counts.nominal,
        "noisy_tokens_forwarded": counts.noisy,
    }
