"""guess_window in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def guess_window(
    window: Tensor,  # [B, n], mutated
    latest: Tensor | None,  # [B, V] stamp * V + token, or -1
    sequences: Tensor | None,  # [B, L]
    generated: Tensor | None,  # [B]
    starts: Tensor | None,  # [B]
    longest: int,
    least: int,
    end: int,
) -> None:
    """All rows at once; only shapes decide what runs, and nothing is read back to the host."""
    improved = window
    if latest is not None:
        improved = _chained(window, latest)
    if sequences is not None and generated is not None and starts is not None:
        text = sequences[:, :end]  # [B, end]
        last = generated.clamp(max=end)[:, None] - 1  # [B, 1]
        run = repeated_ends(text, last, starts.clamp(min=0)[:, None], longest)
        found = latest_of_the_longest(run).argmax(dim=1, keepdim=True)  # [B, 1]
        guesses = followed(text, last, found, window.shape[1] - 1)[:, 0]
        proposed = torch.cat([window[:, :1], guesses], dim=1)
        # where nothing was found, the first column is, with a run of 0
        improved = torch.where(run.gather(1, found) >= least, proposed, improved)
    window.copy_(improved)


def _chained(window: Tensor, latest: Tensor) -> Tensor:
    """[B, n]: behind the window's first token the latest one behind each; where there is none, the
    window's own."""
    vocabulary = latest.shape[1]
    tokens = [window[:, :1]]
    for place in range(1, window.shape[1]):
        token = tokens[-1]
        pair = latest.gather(1, token.clamp(0, vocabulary - 1))
        known = (pair >= 0) & (token >= 0) & (token < vocabulary)
        own = window[:, place : place + 1]
        tokens.append(torch.where(known, pair.remainder(vocabulary), own))
    return torch.cat(tokens, dim=1)


def repeated_ends(
    text: Tensor,  # [B, L]
    last: Tensor,  # [B, 1]
    first: Tensor,  # [B, 1]
    longest: int,
) -> Tensor:
    """[B, L]: how many tokens up to each column, of `longest` at most, equal those up to `last`.

    Only columns before `last` count, and only tokens from `first` on.
    """
    columns = torch.arange(text.shape[1], device=text.device)
    run = torch.zeros_like(text)
    alive = (columns >= first) & (columns < last)
    for back in range(longest):
        key = text.gather(1, (last - back).clamp(min=0))
        # wraps around at the front, where columns - back lies before the row's first
        alive = alive & (text.roll(back, dims=1) == key) & (columns - back >= first)
        run = run + alive
    return run


def latest_of_the_longest(
    run: Tensor,  # [B, L]
) -> Tensor:
    """[B, L] a score that is largest where that is; -1 where nothing is repeated."""
    columns = torch.arange(run.shape[1], device=run.device)
    return (run * run.shape[1] + columns).masked_fill(run == 0, -1)


def followed(
    text: Tensor,  # [B, L]
    last: Tensor,  # [B, 1]
    found: Tensor,  # [B, ways]
    count: int,
) -> Tensor:
    """[B, ways, count]: the tokens behind the columns `found`; from `last` on, those since `found`
    again and again."""
    period = (last - found).clamp(min=1)[:, :, None]
    steps = torch.arange(count, device=text.device)
    place = (found[:, :, None] + 1 + steps % period).clamp(max=text.shape[1] - 1)
    return text.gather(1, place.flatten(1)).view(place.shape)
