"""What ``cllm train`` is given, by flags and a recipe, and the trainer made of it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import CommandError, load
from .options import Dtype

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..models import LoadedModel
    from ..prompts import Prompt
    from ..training.arguments import ConsistencyTrainingArguments
    from ..training.trainer import ConsistencyTrainer

# flags and recipe keys that have another name among the training arguments
SHORT = {
    "output": "output_dir",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "eval_batch_size": "per_device_eval_batch_size",
}
# what the command uses itself
OWN = (
    "model",
    "trajectories",
    "eval_prompts",
    "eval_column",
    "eval_template",
    "eval_limit",
    "dtype",
    "resume",
    "threads",
)
EVAL_PROMPTS = 32
# of a mapping under eval_prompts; named like the flags of `cllm collect`
_SOURCE_KEYS = (
    "dataset_config", "split", "where", "holdout_by", "holdout_share", "take", "shuffle_seed",
    "skip",
)  # fmt: skip
_PROMPT_KEYS = ("prompts", "prompt_column", "prompt_template", "id_column", "few_shot", "limit")


def read_settings(
    config: Path | None, flags: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of this command, training arguments) of a recipe file and flags; flags win.

    Raises:
        RecipeError: a bad recipe. OSError: one that cannot be read.
    """
    from ..training.arguments import ConsistencyTrainingArguments
    from ..training.recipe import RecipeError, read_recipe

    names = {entry.name for entry in fields(ConsistencyTrainingArguments) if entry.init}
    known = names | set(SHORT) | set(OWN)
    values = {} if config is None else read_recipe(config, "train", sorted(known))
    values = {name: value for name, value in values.items() if value is not None}
    for short, long in SHORT.items():
        if short in values and long in values:
            raise RecipeError(f"{config}: {short!r} and {long!r} are one setting; give one of them")
    values = {SHORT.get(name, name): value for name, value in values.items()}
    values |= {SHORT.get(name, name): value for name, value in flags.items()}
    # transformers renamed the field and warns of the old name
    if "activation_checkpointing" in names and "gradient_checkpointing" in values:
        values["activation_checkpointing"] = values.pop("gradient_checkpointing")
    own = {name: values.pop(name) for name in OWN if name in values}
    return own, values


def training_arguments(own: dict[str, Any], values: dict[str, Any]) -> ConsistencyTrainingArguments:
    """The training arguments, after a look at what else the command needs.

    Raises:
        CommandError: something is missing, or the output folder is in use. ValueError: a bad value.
    """
    from ..training.arguments import ConsistencyTrainingArguments
    from ..training.checkpoints import checkpoint_to_resume, last_checkpoint

    if not values.get("output_dir"):
        raise CommandError("say where the model goes: --output FOLDER")
    if not own.get("trajectories"):
        raise CommandError("say what to train on: --trajectories FOLDER (`cllm collect` makes one)")
    if isinstance(own["trajectories"], str):
        own["trajectories"] = [own["trajectories"]]
    if values.get("eval_steps") is not None:
        values.setdefault("eval_strategy", "steps")
        if not own.get("eval_prompts"):
            raise CommandError("--eval-steps needs --eval-prompts FILE")
    args = ConsistencyTrainingArguments(**{"disable_tqdm": True, **values})
    if args.gated and not (args.lora_r or args.lora_from):
        raise CommandError("--gated trains a LoRA adapter: give its rank, --lora-r 16 say")
    output = Path(str(args.output_dir))
    if output.is_file():
        raise CommandError(f"{output} is a file; name a folder")
    if own.get("resume"):
        own["resume"] = checkpoint_to_resume(
            True if own["resume"] in (True, "last") else str(own["resume"]), output
        )
    found = last_checkpoint(output)
    if found is not None and not own.get("resume"):
        raise CommandError(
            f"{output} holds checkpoints of an earlier run ({found.name}); go on with it by "
            "--resume last, or give another --output"
        )
    return args


def prepare(
    own: dict[str, Any], args: ConsistencyTrainingArguments, console: Console
) -> ConsistencyTrainer:
    """Load trajectories, prompts and model, cheapest first, and make the trainer.

    Raises:
        ValueError: whatever does not fit.
    """
    from ..training.store import load_trajectories
    from ..training.trainer import ConsistencyTrainer

    dtype = own.get("dtype", Dtype.float32)
    if dtype not in list(Dtype):
        raise CommandError(f"dtype must be one of {', '.join(Dtype)}, not {dtype!r}")
    dataset = load_trajectories(*own["trajectories"])
    prompts = eval_prompts(own)
    loaded = load(own.get("model"), Dtype(dtype), "cpu", own.get("threads"), console)
    recipe = {name: value for name, value in own.items() if name != "resume"}
    return ConsistencyTrainer(
        loaded.model,
        args,
        dataset,
        processing_class=loaded.tokenizer,
        eval_prompts=_encoded(loaded, prompts, dataset.manifest.settings),
        recipe={**recipe, "model": loaded.name, "dtype": Dtype(dtype).value},
    )


def eval_prompts(own: dict[str, Any]) -> list[Prompt]:
    """The held-out prompts of all sources, none where none were asked for.

    Raises:
        PromptError: a file, column or row that cannot be used. RecipeError: an unknown setting.
    """
    from ..training.recipe import RecipeError, checked

    given = own.get("eval_prompts")
    if not given:
        return []
    found = []
    for source in given if isinstance(given, list) else [given]:
        values: dict[str, Any] = {"prompts": source}
        if not isinstance(source, str):
            if not isinstance(source, dict):
                raise RecipeError(f"eval_prompts takes files and mappings, not {source!r}")
            values = checked(source, (*_SOURCE_KEYS, *_PROMPT_KEYS), "eval_prompts")
        for flag, name in (("eval_column", "prompt_column"), ("eval_template", "prompt_template")):
            if own.get(flag):
                values[name] = own[flag]
        found += _source_prompts(values, own.get("eval_limit") or values.get("limit"))
    return found


def _source_prompts(values: dict[str, Any], limit: int | None) -> list[Prompt]:
    """The prompts of one source, given by the names of the flags of ``cllm collect``."""
    from ..training.collect.sources import Columns, Source, read_few_shot, read_source

    if not values.get("prompts"):
        raise CommandError("eval_prompts: say which file or data set under prompts:")
    if isinstance(values.get("where"), str):
        values["where"] = [values["where"]]
    chosen: dict[str, Any] = {name: values[name] for name in _SOURCE_KEYS if name in values}
    if "dataset_config" in chosen:
        chosen["config"] = chosen.pop("dataset_config")
    template = values.get("prompt_template")
    columns = Columns(
        prompt=values.get("prompt_column", "prompt"),
        template=template and template.replace("\\n", "\n"),
        id=values.get("id_column"),
    )
    source = Source(str(values["prompts"]), limit=limit or EVAL_PROMPTS, **chosen)
    prompts = [row.prompt for row in read_source(source, columns)]
    if values.get("few_shot"):
        examples = read_few_shot(values["few_shot"], columns)
        prompts = [examples.apply(prompt) for prompt in prompts]
    return prompts


def _encoded(
    loaded: LoadedModel, prompts: list[Prompt], collected: dict[str, Any]
) -> list[torch.Tensor] | None:
    """Token ids of the prompts, in the chat that the trajectories were collected in."""
    from ..prompts import check_length, encode

    found = []
    for prompt in prompts:
        ids = encode(
            loaded.tokenizer,
            prompt,
            system=collected.get("system"),
            chat_template=collected.get("chat_template", True),
        )
        check_length(loaded.model, prompt, ids)
        found.append(ids)
    return found or None
