"""guess_candidates in plain PyTorch: the definition that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm_kernels.guess_window import reference as one

# Whose turn it is. Usable guesses that begin as others do have the rank behind theirs.
USABLE, SHORT, COPY, NONE = 0, 2, 3, 4


def guess_candidates(
    window: Tensor,  # [B, n]
    count: int,
    latest: Tensor | None,  # [B, V] stamp * V + token, or -1
    sequences: Tensor | None,  # [B, L]
    generated: Tensor | None,  # [B]
    starts: Tensor | None,  # [B]
    longest: int,
    least: int,
    end: int,
    own_second: bool,
    odds: Tensor | None,  # [B, 2 + longest, 2], mutated
    proposed: Tensor | None,  # [B, 3, n], mutated
    since: Tensor | None,  # [B], mutated
) -> Tensor:  # [B, count, n]
    """All rows at once; only shapes decide what runs, and nothing is read back to the host."""
    rows, n = window.shape
    if n == 1 or rows == 0:
        return window[:, None].repeat(1, count, 1)
    own = window[:, None, 1:]
    ways, run = own[:, :0], own[:, :0, 0]  # none
    if sequences is not None and generated is not None and starts is not None and longest > 0:
        last = generated.clamp(max=end) - 1
        text = sequences[:, :end]
        ways, run = _ways(text, last, starts.clamp(min=0), longest, count, n - 1)
    rank = torch.where(run >= least, USABLE, torch.where(run > 0, SHORT, NONE))
    if odds is not None and proposed is not None and since is not None:
        # what it counts and proposes is wanted; the window it makes is one of the ranked
        taken = window.clone(memory_format=torch.contiguous_format)
        kept = (odds, proposed, since)
        one.guess_window(taken, latest, sequences, generated, starts, longest, least, end, *kept)
        order = _ranked(odds, proposed[:, :, 0])  # [B, 3]
        guesses = proposed[:, :, 1:].gather(1, order[:, :, None].expand(-1, -1, n - 1))
        there = proposed[:, :, 0].gather(1, order) >= 0
        # the first way is among the ranked, or too short to be
        first = rank[:, :1].masked_fill(rank[:, :1] == USABLE, NONE)
        sources = [guesses, ways]
        ranks = [torch.where(there, USABLE, NONE), first, rank[:, 1:]]
        own_place = (order == 0).long().argmax(dim=1, keepdim=True)
    else:
        chains = [] if latest is None else [one.chained(window, latest)[:, None, 1:]]
        sources = [ways, *chains, own]
        ranks = [rank, window.new_full((rows, len(chains) + 1), USABLE)]
        own_place = window.new_full((rows, 1), ways.shape[1] + len(chains))
    # copies, so that there are enough of them
    sources.append(own.expand(-1, count - 1, -1))
    ranks.append(window.new_full((rows, count - 1), COPY))
    every = torch.cat(sources, dim=1)
    guesses = _chosen(every, torch.cat(ranks, dim=1), own_place, count, own_second)
    return torch.cat([window[:, None, :1].expand(-1, count, -1), guesses], dim=2)


def _ways(
    text: Tensor,  # [B, end]
    last: Tensor,  # [B]
    first: Tensor,  # [B]
    longest: int,
    count: int,
    length: int,
) -> tuple[Tensor, Tensor]:  # [B, count, length], [B, count]
    """What followed the end of the text, each time with another token first, and how many tokens of
    the end stood before it; 0: there is none."""
    run = one.repeated_ends(text, last[:, None], first[:, None], longest)
    score = one.latest_of_the_longest(run)
    following = text.roll(-1, dims=1)
    places, runs = [], []
    for _ in range(count):
        place = score.argmax(dim=1, keepdim=True)
        runs.append(torch.where(score.gather(1, place) >= 0, run.gather(1, place), 0))
        places.append(place)
        score = score.masked_fill(following == following.gather(1, place), -1)
    ways = one.followed(text, last[:, None], torch.cat(places, dim=1), length)
    return ways, torch.cat(runs, dim=1)


def _ranked(
    odds: Tensor,  # [B, kinds, 2]
    kinds: Tensor,  # [B, 3], -1: nothing was proposed; the first always is
) -> Tensor:
    """[B, 3] sources: the one with most right guesses to a wrong one, of equals the last; the one
    that would be if there were not the first; the third. What proposed nothing may be among the
    last two."""
    place = torch.arange(3, device=kinds.device)
    first = one.best_source(odds, kinds)[:, None]
    left = kinds.masked_fill(place == first, -1)
    second = one.best_source(odds, left)[:, None]
    key = torch.where(place == second, 1, 2).masked_fill(place == first, 0)
    return (key * 3 + place).argsort(dim=1)


def _chosen(
    guesses: Tensor,  # [B, S, n - 1], the best source first
    ranks: Tensor,  # [B, S], at least `count` of every row not NONE
    own_place: Tensor,  # [B, 1]
    count: int,
    own_second: bool,
) -> Tensor:  # [B, count, n - 1]
    """The first usable guesses that do not begin as an earlier one does, then the other usable
    ones, then those of a lesser rank."""
    sources = guesses.shape[1]
    place = torch.arange(sources, device=guesses.device)
    own, usable = place == own_place, ranks == USABLE  # [B, S]
    key = 2 * place.expand_as(usable)
    if own_second:
        first = key.masked_fill(~usable, 2 * sources).amin(dim=1, keepdim=True)
        key = torch.where(own, key.minimum(first + 1), key)
    begun = guesses[:, :, 0]
    earlier = usable[:, None, :] & (key[:, None, :] < key[:, :, None])
    same = ((begun[:, :, None] == begun[:, None, :]) & earlier).any(dim=2) & usable
    if own_second:
        same &= ~own
    order = ((ranks + same) * 2 * sources + key).argsort(dim=1)[:, :count]  # no two are the same
    return guesses.gather(1, order[:, :, None].expand(-1, -1, guesses.shape[2]))
