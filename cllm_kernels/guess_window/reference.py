"""guess_window in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

# What a guess that was right or wrong counts in `odds`. Where the two counts of a kind of guess
# come to more than `MEMORY`, both are halved: texts change, and what was long ago counts less.
GUESS = 1024
MEMORY = 32 * GUESS


def guess_window(
    window: Tensor,  # [B, n], mutated
    latest: Tensor | None,  # [B, V] stamp * V + token, or -1
    sequences: Tensor | None,  # [B, L]
    generated: Tensor | None,  # [B]
    starts: Tensor | None,  # [B]
    longest: int,
    least: int,
    end: int,
    odds: Tensor | None = None,  # [B, 2 + longest, 2], mutated
    proposed: Tensor | None = None,  # [B, 3, n], mutated
    since: Tensor | None = None,  # [B], mutated
) -> None:
    """All rows at once; only shapes decide what runs, and nothing is read back to the host."""
    if window.shape[1] == 1:
        return
    first = window[:, :1]
    pooled = window if latest is None else chained(window, latest)
    guesses, run = window, torch.zeros_like(first)  # [B, n], [B, 1]
    if sequences is not None and generated is not None and starts is not None and longest > 0:
        text = sequences[:, :end]  # [B, end]
        last = generated.clamp(max=end)[:, None] - 1  # [B, 1]
        runs = repeated_ends(text, last, starts.clamp(min=0)[:, None], longest)
        found = latest_of_the_longest(runs).argmax(dim=1, keepdim=True)  # [B, 1]
        guesses = torch.cat([first, followed(text, last, found, window.shape[1] - 1)[:, 0]], dim=1)
        # where nothing was found, the first column is, with a run of 0
        run = runs.gather(1, found)
    run = run.masked_fill(run < least, 0)
    if odds is None or proposed is None or since is None:
        window.copy_(torch.where(run > 0, guesses, pooled))
        return
    assert sequences is not None and generated is not None
    _learn(odds, proposed, since, sequences, generated.clamp(max=end))
    own, pool = torch.zeros_like(run), torch.full_like(run, -1 if latest is None else 1)
    kinds = torch.cat([own, pool, torch.where(run > 0, run + 1, -1)], dim=1)  # [B, 3]
    made = torch.stack([window, pooled, torch.where(run > 0, guesses, window)], dim=1)  # [B, 3, n]
    proposed.copy_(made)
    proposed[:, :, 0] = kinds
    since.copy_(generated)
    best = best_source(odds, kinds)[:, None, None].expand(-1, 1, made.shape[2])
    window.copy_(made.gather(1, best)[:, 0])


def _learn(
    odds: Tensor,  # [B, kinds, 2], mutated
    proposed: Tensor,  # [B, 3, n]
    since: Tensor,  # [B]
    sequences: Tensor,  # [B, L]
    generated: Tensor,  # [B]
) -> None:
    """Counts what the text has become since the proposals were made for or against each."""
    kind = proposed[:, :, 0]  # [B, 3]
    slots = torch.arange(proposed.shape[2] - 1, device=odds.device)
    known = (generated - since).clamp(max=slots.shape[0]).masked_fill(since < 0, 0)[:, None, None]
    places = (since[:, None] + slots).clamp(0, sequences.shape[1] - 1)
    truth = sequences.gather(1, places)[:, None]  # [B, 1, n - 1]
    same = (proposed[:, :, 1:] == truth) & (slots < known)
    right = same.long().cumprod(dim=2).sum(dim=2)  # [B, 3]
    wrong = right < known[:, :, 0]
    counts = (kind >= 0) & (kind < odds.shape[1]) & (known[:, :, 0] > 0)
    rows = torch.where(counts, kind, 0)[:, :, None].expand(-1, -1, 2)
    before = odds.gather(1, rows)  # [B, 3, 2]
    after = before + GUESS * torch.stack([right, wrong.long()], dim=2)
    halved = after >> 1
    halved[:, :, 1].clamp_(min=1)
    after = torch.where(after.sum(dim=2, keepdim=True) > MEMORY, halved, after)
    # no two sources are of one kind, but those that do not count add nothing to the first
    odds.scatter_add_(1, rows, (after - before) * counts[:, :, None])


def best_source(
    odds: Tensor,  # [B, kinds, 2]
    kinds: Tensor,  # [B, 3], -1: nothing was proposed
) -> Tensor:
    """[B]: the source with most right guesses to a wrong one, the last of equals; 0 where nothing
    was proposed at all."""
    good, bad = odds.gather(1, kinds.clamp(min=0)[:, :, None].expand(-1, -1, 2)).unbind(dim=2)
    best = torch.zeros_like(kinds[:, :1])
    for source in range(1, kinds.shape[1]):
        mine, its = good[:, source : source + 1], good.gather(1, best)
        against, for_it = bad[:, source : source + 1], bad.gather(1, best)
        better = (mine * for_it >= its * against) | (kinds.gather(1, best) < 0)
        best = torch.where((kinds[:, source : source + 1] >= 0) & better, source, best)
    return best[:, 0]


def chained(window: Tensor, latest: Tensor) -> Tensor:
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
