"""How far a text may go: positions that end, and RoPE whose frequencies change with the length."""

from __future__ import annotations

import torch

from .config import JacobiConfig
from .loop import DecodingLoop, WindowState
from .stopping import StopRules
from .support import ModelTraits, UnsupportedOptionError


def position_limit(traits: ModelTraits, lengths: torch.Tensor, new_tokens: int) -> int | None:
    """What no window token may be given a position at or beyond, though its guesses run past the
    end of the text; None: there is no such thing.

    A guess beyond the positions that the model has would ask for an embedding that is not there,
    and one beyond the threshold of a `RopeChange` would turn the right tokens of its window, too.

    Args:
        lengths: [B] of the prompts.
        new_tokens: most tokens that may be generated.

    Raises:
        UnsupportedOptionError: the frequencies change within the text. Keys that are in the cache
            would be those of others, and every model has an own way to deal with that.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    # the last token is never fed
    fed = longest + new_tokens - 1
    limit = traits.context
    if limit is not None and not traits.bounded_positions:
        limit = max(limit, fed + 1)
    for change in traits.rope_changes:
        if fed <= change.threshold:
            limit = change.threshold if limit is None else min(limit, change.threshold)
            continue
        # a prompt but its last token is read by itself, and is to get the frequencies of the text
        if change.once and shortest - 1 > change.threshold:
            continue
        prompt = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
        beyond = f", or a prompt of at least {change.threshold + 2}" if change.once else ""
        raise UnsupportedOptionError(
            f"rope_type={change.rope_type!r} at this length",
            f"the model's frequencies change behind {change.threshold} tokens, and the prompt has "
            f"{prompt} with up to {new_tokens} new ones; ask for at most {change.threshold + 1} "
            f"tokens in all{beyond}",
        )
    return limit


def check_room(
    traits: ModelTraits,
    lengths: torch.Tensor,
    new_tokens: int,
    rules: StopRules,
    config: JacobiConfig,
) -> None:
    """Refuse texts that are sure to come to the end of the model's positions.

    Where something may end them before that, as a stop token does under a generous length limit,
    only those that get there are refused, by `check_ended`.

    Raises:
        ValueError: naming the sizes.
    """
    room = _room(traits, lengths)
    if room is None or config.max_iterations is not None:
        return
    if rules.stop_ids or rules.per_token or rules.per_iteration:
        return
    longest = int(lengths.max())
    if new_tokens > int(room.min()):
        raise ValueError(
            f"the prompt has {longest} tokens and the model {traits.context} positions, too few "
            f"for {new_tokens} new tokens; ask for at most {int(room.min())}"
        )


def limit_rows(traits: ModelTraits, state: WindowState) -> None:
    """Let every row of a state before its first forward end with the model's positions."""
    room = _room(traits, state.lengths + 1)
    if room is not None:
        state.limits = torch.minimum(state.limits, state.generated + room)


def check_ended(traits: ModelTraits, loop: DecodingLoop) -> None:
    """Refuse what has come to the end of the model's positions before its own end.

    Raises:
        ValueError: naming the sizes; transformers' own loop would ask for a position that is not
            there.
    """
    if not traits.bounded_positions:
        return
    whole = loop.state.sequences.shape[1]
    stop_ids = set(loop.rules.stop_ids)
    for index, (row, limit) in enumerate(zip(loop.rows, loop.state.limits.tolist(), strict=True)):
        if row.generated < limit or limit == whole or row.stopped:
            continue
        if int(loop.state.sequences[index, limit - 1]) in stop_ids:
            continue
        new_tokens = limit - loop.prompt_width
        raise ValueError(
            f"the text of row {index} has come to the last of the model's {traits.context} "
            f"positions with {new_tokens} new tokens and has not ended; ask for no more than those"
        )


def _room(traits: ModelTraits, lengths: torch.Tensor) -> torch.Tensor | None:
    """[B] most new tokens behind prompts of these lengths, or None: any number."""
    if traits.context is None or not traits.bounded_positions:
        return None
    # the last token is never fed
    return traits.context + 1 - lengths
