"""``cllm collect``: prompts in, a folder of Jacobi trajectories out."""

from __future__ import annotations

import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import CommandError, diagnostics, load, writable_folder
from .options import (
    BlockSizeOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    Fill,
    FillOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
)
from .recipes import config_option

if TYPE_CHECKING:
    from ..training.collect.runner import Workers
    from ..training.collect.sources import FewShot, Row


class Engine(StrEnum):
    jacobi = "jacobi"
    huggingface = "huggingface"


class Take(StrEnum):
    train = "train"
    holdout = "holdout"


_SOURCE = "Prompts"
_CLEAN = "Cleaning (a share of 1 switches a filter off)"


def collect(
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="SOURCE",
            help="A .jsonl file; a Parquet, CSV or JSON file or folder; a data set on the hub.",
            rich_help_panel=_SOURCE,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Where the trajectories go; run again to continue.",
        ),
    ],
    model: ModelOption = None,
    config: Annotated[Path | None, config_option("collect")] = None,
    dataset_config: Annotated[
        str | None,
        typer.Option(
            "--dataset-config",
            help="Configuration of a data set that has several; '' takes back a recipe's.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="Split of a data set.", rich_help_panel=_SOURCE)
    ] = "train",
    prompt_column: Annotated[
        str,
        typer.Option(
            "--prompt-column",
            help="Column with the prompt: text, or a chat up to its last user turn.",
            rich_help_panel=_SOURCE,
        ),
    ] = "prompt",
    prompt_template: Annotated[
        str | None,
        typer.Option(
            "--prompt-template",
            help=r"Prompt from several columns: '{schema}\n\nQuestion: {question}'.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            "--id-column",
            help='Column that names a prompt.  [default: "id", else its number]',
            rich_help_panel=_SOURCE,
            show_default=False,
        ),
    ] = None,
    response_column: Annotated[
        str | None,
        typer.Option(
            "--response-column",
            help="Column with the model's own greedy responses from another engine: text or token "
            "ids. They are checked.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="COLUMN=VALUE",
            help="Only rows with this value; != for the others. Repeat it: values of one column "
            "are alternatives, columns must all fit.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    holdout_by: Annotated[
        str | None,
        typer.Option(
            "--holdout-by",
            metavar="COLUMN",
            help="Hold out whole groups of rows with one value here, by a hash of the value.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    holdout_share: Annotated[
        float,
        typer.Option(
            "--holdout-share", help="About this share of the values.", rich_help_panel=_SOURCE
        ),
    ] = 0.0,
    take: Annotated[
        Take,
        typer.Option("--take", help="The rows held out, or the others.", rich_help_panel=_SOURCE),
    ] = Take.train,
    shuffle_seed: Annotated[
        int | None,
        typer.Option(
            "--shuffle-seed",
            help="Shuffle the rows that were chosen, before --skip and --limit.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    skip: Annotated[
        int,
        typer.Option(
            "--skip", min=0, help="Leave out so many rows in front.", rich_help_panel=_SOURCE
        ),
    ] = 0,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Only so many prompts.", rich_help_panel=_SOURCE),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", help="System message of the chat template.", rich_help_panel=_SOURCE
        ),
    ] = None,
    few_shot: Annotated[
        Path | None,
        typer.Option(
            "--few-shot",
            metavar="FILE",
            help='Earlier turns (.jsonl: the prompt\'s columns and "response" or "answer"), or '
            "text to put in front of each prompt.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    no_chat_template: Annotated[
        bool,
        typer.Option(
            "--no-chat-template", help="Feed prompts as they stand.", rich_help_panel=_SOURCE
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest response.")
    ] = 512,
    block_size: BlockSizeOption = 16,
    fill: FillOption = Fill.prompt,
    seed: SeedOption = 0,
    block_share: Annotated[
        float,
        typer.Option("--block-share", help="Share of each response's blocks to iterate; 0: none."),
    ] = 1.0,
    engine: Annotated[
        Engine, typer.Option("--engine", help="What makes the responses; the text is the same.")
    ] = Engine.jacobi,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts in one forward.")
    ] = 8,
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Prompts of a file.")] = 32,
    max_mismatch: Annotated[
        float,
        typer.Option(
            "--max-mismatch",
            min=0.0,
            max=1.0,
            help="Stop if more of the responses are not the model's own output.",
        ),
    ] = 0.05,
    keep_duplicates: Annotated[
        bool,
        typer.Option(
            "--keep-duplicates", help="Keep prompts that occur again.", rich_help_panel=_CLEAN
        ),
    ] = False,
    drop_cut: Annotated[
        bool,
        typer.Option(
            "--drop-cut", help="Drop responses that the limit cut off.", rich_help_panel=_CLEAN
        ),
    ] = False,
    min_prompt_tokens: Annotated[
        int, typer.Option("--min-prompt-tokens", min=1, rich_help_panel=_CLEAN)
    ] = 1,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", min=1, rich_help_panel=_CLEAN)
    ] = None,
    min_response_tokens: Annotated[
        int, typer.Option("--min-response-tokens", min=1, rich_help_panel=_CLEAN)
    ] = 2,
    max_response_tokens: Annotated[
        int | None, typer.Option("--max-response-tokens", min=1, rich_help_panel=_CLEAN)
    ] = None,
    max_repeated_ngrams: Annotated[
        float,
        typer.Option(
            "--max-repeated-ngrams",
            help="Largest share of 4-grams of tokens that stood there before.",
            rich_help_panel=_CLEAN,
        ),
    ] = 0.5,
    max_cycle: Annotated[
        float,
        typer.Option(
            "--max-cycle",
            help="Largest share of a response that one repeated run of tokens may cover.",
            rich_help_panel=_CLEAN,
        ),
    ] = 0.25,
    max_repeated_sentences: Annotated[
        float,
        typer.Option(
            "--max-repeated-sentences",
            help="Largest share of sentences and lines that stood there before.",
            rich_help_panel=_CLEAN,
        ),
    ] = 0.3,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop what --output already holds.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The summary as JSON.")] = False,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> int:
    """Collect Jacobi trajectories of a model's own responses, to train it on.

    Several processes share the work: torchrun --nproc-per-node 8 -m cllm.cli collect ...
    """
    errors = diagnostics()
    workers, local_rank = _workers()
    from ..training.collect.cleaning import Cleaning
    from ..training.collect.sources import Columns, Source, read_few_shot, read_source

    cleaning = Cleaning(
        dedup=not keep_duplicates,
        min_prompt_tokens=min_prompt_tokens,
        max_prompt_tokens=max_prompt_tokens,
        min_response_tokens=min_response_tokens,
        max_response_tokens=max_response_tokens,
        keep_cut=not drop_cut,
        max_repeated_ngrams=max_repeated_ngrams,
        max_cycle=max_cycle,
        max_repeated_sentences=max_repeated_sentences,
    )
    source = Source(
        prompts,
        config=dataset_config or None,
        split=split,
        where=where or (),
        holdout_by=holdout_by,
        holdout_share=holdout_share,
        take=take.value,
        shuffle_seed=shuffle_seed,
        skip=skip,
        limit=limit,
    )
    columns = Columns(
        prompt_column,
        template=prompt_template and prompt_template.replace("\\n", "\n"),
        id=id_column,
        response=response_column,
    )
    examples = read_few_shot(few_shot, columns) if few_shot is not None else None
    with errors.status(f"reading {prompts}"):
        rows = _with_examples(read_source(source, columns), examples)
    writable_folder(output)
    from ..training.collect.shard import CollectOptions
    from .collect_run import CollectRun

    options = CollectOptions(
        block_size=block_size,
        fill=fill.value,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        shard_size=shard_size,
        block_share=block_share,
        cleaning=cleaning,
        system=system,
        chat_template=not no_chat_template,
    )
    run = CollectRun(rows, options, asdict(source), output, workers, errors)
    loaded = load(model, dtype, _device(device, workers, local_rank), threads, errors)
    return run.run(loaded, engine.value, max_mismatch, overwrite, json)


def _workers() -> tuple[Workers, int]:
    """This process among those of ``torchrun`` or ``accelerate launch``, and its local rank."""
    from ..training.collect.runner import Workers

    values = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, "")
        try:
            values[name] = int(text) if text else default
        except ValueError as error:
            raise CommandError(f"the environment variable {name} is {text!r}, no number") from error
    if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
        raise CommandError(
            f"the environment says RANK={values['RANK']} of WORLD_SIZE={values['WORLD_SIZE']}; "
            "ranks go from 0"
        )
    return Workers(values["RANK"], values["WORLD_SIZE"]), values["LOCAL_RANK"]


def _device(name: str, workers: Workers, local_rank: int) -> str:
    """One GPU each for several processes on one machine."""
    if workers.world_size == 1 or name not in ("auto", "cuda"):
        return name
    import torch

    return f"cuda:{local_rank}" if torch.cuda.is_available() else name


def _with_examples(rows: list[Row], examples: FewShot | None) -> list[Row]:
    if examples is None:
        return rows
    from dataclasses import replace

    return [replace(row, prompt=examples.apply(row.prompt)) for row in rows]
