"""How far a text may go: RoPE whose frequencies change with the length."""

from __future__ import annotations

import torch

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
