"""The model card of an adapter: what is known, and that the rest was not recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import default_model
from .errors import AdapterError
from .gated import GatedAdapter

CARD = "README.md"
FACTS = ("data", "recipe", "tokens", "time", "hardware")
# arguments of training that say how the weights came about, and hold no path
_ARGUMENTS = (
    "sampling",
    "states",
    "row_decay",
    "window_size",
    "augment",
    "divergence",
    "temperature",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "seed",
)


def render_card(
    adapter: GatedAdapter,
    name: str,
    *,
    dtype: torch.dtype,
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown under a YAML header.

    No number is made up: what neither the adapter nor one of the records says is called not
    recorded, or not measured.

    Args:
        adapter: with the metadata that are written beside the card.
        name: of the adapter.
        dtype: that the weights are written in.
        recipe: ``cllm_recipe.json`` of the trained folder.
        results: task to ``{"prompts": N, "tokens_per_forward": {"base": x, "adapter": y},
            "identical": N or true}``, the prompts on which the text equalled the base model's.
        facts: a text each for ``data``, ``recipe``, ``tokens``, ``time``, ``hardware``.

    Raises:
        AdapterError: results or facts of another form, naming the entry.
    """
    recipe = recipe or {}
    texts = _checked_facts({} if facts is None else facts)
    arguments = recipe.get("arguments", {})
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)
    parameter_bytes = torch.empty(0, dtype=dtype).element_size() * adapter.parameters
    base = adapter.metadata["base_model"]
    return environment.get_template("card.md.j2").render(
        name=name,
        base=base,
        default=base == default_model.HUB_ID,
        wheel=default_model.WHEEL,
        fingerprint=adapter.metadata.get("base_fingerprint", "not recorded"),
        metadata=adapter.metadata,
        ranks=", ".join(map(str, adapter.ranks)),
        modules=len(adapter.weights),
        parameters=adapter.parameters,
        mebibytes=parameter_bytes / 2**20,
        dtype=str(dtype).removeprefix("torch."),
        facts=texts,
        forwarded=_said(
            adapter.metadata.get("noisy_tokens_forwarded"), ", {:,.0f} of them forwarded"
        ),
        steps=_said(adapter.metadata.get("step"), ", in {:,} steps"),
        arguments={key: arguments[key] for key in _ARGUMENTS if arguments.get(key) is not None},
        trajectories=[
            {"block_size": entry.get("block_size"), "responses": _rows(entry)}
            for entry in recipe.get("trajectories", [])
            if isinstance(entry, dict)
        ],
        results=_checked_results({} if results is None else results),
    )


def _said(number: float | None, text: str) -> str:
    return text.format(number) if number else ""


def _rows(manifest: Mapping[str, Any]) -> int:
    return sum(int(shard.get("rows", 0)) for shard in manifest.get("shards", []))


def _checked_facts(facts: Any) -> dict[str, str | None]:
    if not isinstance(facts, Mapping):
        raise AdapterError("the facts for the model card must be one JSON object")
    for key, value in facts.items():
        if key not in FACTS or not isinstance(value, str):
            raise AdapterError(
                f"facts for the model card are texts called {', '.join(FACTS)}, not "
                f"{key!r}: {value!r}"
            )
    return {key: facts.get(key) for key in FACTS}


def _checked_results(results: Any) -> list[dict[str, Any]]:
    if not isinstance(results, Mapping):
        raise AdapterError("the results for the model card must be one JSON object, by task")
    rows = []
    for task, result in results.items():
        try:
            prompts, identical = result["prompts"], result["identical"]
            base, adapter = (result["tokens_per_forward"][side] for side in ("base", "adapter"))
        except (KeyError, TypeError) as error:
            raise AdapterError(
                f"the results of {task} lack {error}; a task has prompts, tokens_per_forward "
                "(base, adapter) and identical"
            ) from error
        whole = isinstance(prompts, int) and not isinstance(prompts, bool) and prompts > 0
        same = isinstance(identical, bool) or (
            isinstance(identical, int) and whole and 0 <= identical <= prompts
        )
        numbers = all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0
            for x in (base, adapter)
        )
        if not (whole and same and numbers):
            raise AdapterError(
                f"the results of {task} must be positive numbers, and identical a number of its "
                "prompts, true or false"
            )
        if isinstance(identical, bool):
            shown = "all" if identical else "not all"
        else:
            shown = f"{identical} of {prompts}"
        rows.append(
            {
                "task": " ".join(str(task).split()).replace("|", "\\|"),
                "prompts": prompts,
                "base": base,
                "adapter": adapter,
                "identical": shown,
            }
        )
    return rows
