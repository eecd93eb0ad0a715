"""What `ConsistencyTrainer` feeds on: trajectories, the collator, end-of-text tokens."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..prompts import context_length
from .arguments import ConsistencyTrainingArguments
from .collect.augment import AugmentedTrajectories
from .order import NumberedExamples
from .packing import ConsistencyCollator
from .store import StoreError, TrajectoryDataset, load_trajectories, tokenizer_hash


def training_examples(dataset: Any, args: ConsistencyTrainingArguments, ends: list[int]) -> Any:
    """The examples of an epoch, with the states that `args` asks for.

    Args:
        dataset: what `trajectories` returns. ends: end-of-text tokens.

    Raises:
        ValueError: responses without trajectories, where `args` needs those.
    """
    seed = data_seed(args)
    blocks = (dataset[number].blocks for number in range(len(dataset)))
    if args.sampling != "visited" and not any(blocks):
        raise ValueError(
            "the data set holds responses without trajectories (block_share 0), which only "
            "sampling='visited' trains on; collect with a block_share above 0"
        )
    if args.augment:
        dataset = AugmentedTrajectories(dataset, seed=seed, share=args.augment)
    return NumberedExamples(dataset, args.consistency_config(), seed, ends)


def data_seed(args: ConsistencyTrainingArguments) -> int:
    """Of the order of responses and the choice of states."""
    return int(args.data_seed if args.data_seed is not None else args.seed)


def trajectories(given: Any, tokenizer: Any) -> Any:
    """The data set that `given` is or names: a data set, a folder, or several folders.

    Raises:
        StoreError: a folder that holds no trajectories, or those of another tokenizer.
        ValueError: an empty data set.
    """
    if isinstance(given, (str, os.PathLike)):
        given = [given]
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], (str, os.PathLike)):
        return load_trajectories(*given, tokenizer=tokenizer)
    fits = tokenizer is None or not isinstance(given, TrajectoryDataset)
    if not fits and tokenizer_hash(tokenizer) != given.manifest.tokenizer_hash:
        raise StoreError(
            f"the tokenizer is not the one that {given.folders[0]} was collected with: its token "
            "ids would mean other text; train the same model, or collect with this one"
        )
    if not len(given):
        raise ValueError("the data set holds no trajectories")
    return given


def collator(args: ConsistencyTrainingArguments, tokenizer: Any, model: Any) -> ConsistencyCollator:
    """What makes batches of sampled examples."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return ConsistencyCollator(
        args.consistency_config(),
        0 if pad is None else pad,
        samples_per_row=1 if args.row_tokens is None else None,
        max_columns=args.row_tokens,
        context=context_length(model),
        # few shapes for a compiler or an allocator; on a CPU padding is only work
        column_multiple=64 if torch.cuda.is_available() else 16,
    )


def end_tokens(model: Any) -> list[int]:
    """Ids of the model's end-of-text tokens."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()
