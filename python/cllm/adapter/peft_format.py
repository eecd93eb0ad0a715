"""PEFT's folder of a LoRA adapter, read and written without PEFT.

``adapter_config.json`` says what the weights are, ``adapter_model.safetensors`` holds them under
``base_model.model.<module>.lora_A.weight``. Beside them stands ``cllm_adapter.json``: what the gate
has to know and PEFT has no field for.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from .errors import AdapterError
from .weights import LowRank

CONFIG, WEIGHTS, METADATA = "adapter_config.json", "adapter_model.safetensors", "cllm_adapter.json"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")
# fields that, when set, make more of an adapter than two matrices a linear layer
_BEYOND_LORA = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
)
# ways of drawing the first weights that leave the base model's weights alone
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def refuse_config(config: dict[str, Any]) -> None:
    """Refuse what is more than plain LoRA on linear layers.

    Raises:
        AdapterError: naming the field of ``adapter_config.json``.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise AdapterError(f"the adapter has peft_type {kind!r}; only LORA can be gated")
    if config.get("bias") not in (None, "none"):
        raise AdapterError(
            f"the adapter was trained with bias={config['bias']!r}, which changes the base "
            "weights; train with bias='none'"
        )
    for field in _BEYOND_LORA:
        if config.get(field):
            raise AdapterError(
                f"the adapter was trained with {field}, which is more than the low-rank weights "
                "that a gate can add; train without it"
            )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise AdapterError(
            f"the adapter was started with init_lora_weights={start!r}, which changes the base "
            "weights; train with init_lora_weights=True"
        )


def find_folder(source: str | Path) -> Path:
    """The folder of an adapter: `source` itself, or a snapshot of the hub's repository.

    Raises:
        AdapterError: there is no adapter there; the message says what there is.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            whole = (folder / "config.json").is_file()
            why = (
                "it holds a whole model; an adapter that was merged into its base cannot be gated, "
                "save the PEFT model before merging"
                if whole
                else f"it has no {CONFIG}"
            )
            raise AdapterError(f"{folder} is not an adapter's folder: {why}")
        return folder
    text = str(source)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise AdapterError(f"{text} is no adapter: neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [CONFIG, WEIGHTS, METADATA]
        return find_folder(Path(snapshot_download(text, allow_patterns=wanted)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdapterError(
            f"no adapter at {text}: no such folder, and the hub says: {reason}"
        ) from error


def read_folder(folder: Path) -> tuple[dict[str, LowRank], dict[str, Any]]:
    """Weights by module name, and the metadata.

    Raises:
        AdapterError: a file is missing, damaged or more than plain LoRA.
    """
    config = _read_json(folder / CONFIG)
    refuse_config(config)
    metadata = read_metadata(folder) if (folder / METADATA).is_file() else {}
    metadata.setdefault("base_model", config.get("base_model_name_or_path"))
    return _weights(_read_tensors(folder / WEIGHTS), config), metadata


def read_metadata(folder: Path) -> dict[str, Any]:
    """What ``cllm_adapter.json`` holds.

    Raises:
        AdapterError: it is missing or no JSON object.
    """
    return _read_json(folder / METADATA)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} must hold one JSON object")
    return value


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise AdapterError(
            f"{path.parent} has no {WEIGHTS}; save the adapter as safetensors, pickles are not read"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from error


def _weights(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, LowRank]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise AdapterError(
                f"the adapter holds {key}, which is no low-rank weight of a linear layer; "
                "embeddings, biases and whole modules cannot be gated"
            )
        pairs.setdefault(match["module"], {})[match["letter"]] = tensor
    if not pairs:
        raise AdapterError(f"{WEIGHTS} is empty")
    weights = {}
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise AdapterError(f"the adapter has one of lora_A and lora_B of {module}, not both")
        rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
            raise AdapterError(f"{CONFIG} must give r and lora_alpha as numbers")
        if pair["A"].shape[:1] != (rank,):
            raise AdapterError(
                f"{CONFIG} says rank {rank} for {module}, but its lora_A is "
                f"{list(pair['A'].shape)}; the two files do not belong together"
            )
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        weights[module] = LowRank(pair["A"], pair["B"], scaling)
    return weights


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the module's name or its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def write_folder(
    folder: Path, weights: dict[str, LowRank], metadata: dict[str, Any], dtype: torch.dtype | None
) -> None:
    """Write what `read_folder` and PEFT read; the weights in `dtype`, or as they are."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, pair in weights.items():
        for letter, tensor in (("A", pair.a), ("B", pair.b)):
            kept = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] = kept
    write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    # what most modules have is the default, the others are patterns
    ranks = {name: pair.rank for name, pair in weights.items()}
    alphas = {name: _number(pair.scaling * pair.rank) for name, pair in weights.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": metadata.get("base_model"),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(weights),
        "rank_pattern": {re.escape(n): value for n, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(n): value for n, value in alphas.items() if value != alpha},
        "inference_mode": True,
    }
    for name, value in ((CONFIG, config), (METADATA, metadata)):
        write_atomically(folder / name, (json.dumps(value, indent=2) + "\n").encode())


def _number(value: float) -> int | float:
    """lora_alpha as it was written: scaling * rank rounds."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
