"""What guess_window and guess_candidates make of a row, written out in lists."""

from __future__ import annotations

import torch

from cllm_kernels.guess_window.reference import GUESS, MEMORY

V = 7


def table(*rows):
    """latest [B, V] of {token: latest token behind it}, entries of different stamps."""
    made = torch.full((len(rows), V), -1)
    for number, known in enumerate(rows):
        for stamp, (token, following) in enumerate(known.items()):
            made[number, token] = stamp * V + following
    return made


class Weighed:
    """What a row proposes, learns and takes, written out in lists."""

    def __init__(self, longest, least, odds):
        self.longest, self.least = longest, least
        self.odds = [list(pair) for pair in odds]
        self.proposed, self.since = [], -1

    def take(self, window, known, text):
        """The row's next window; `known` is None without a pool."""
        became = text[self.since :] if self.since >= 0 else []
        for kind, guesses in self.proposed:
            right = 0
            compared = min(len(became), len(guesses))
            while right < compared and guesses[right] == became[right]:
                right += 1
            if kind >= 0 and compared:
                pair = self.odds[kind]
                pair[0] += right * GUESS
                pair[1] += GUESS if right < compared else 0
                if sum(pair) > MEMORY:
                    pair[:] = pair[0] // 2, max(pair[1] // 2, 1)
        own = window[1:]
        chained = definition(window, known or {}, [], 0, 1)[1:]
        run = next(
            (
                length
                for length in range(min(self.longest, len(text) - 1), 0, -1)
                if any(text[p : p + length] == text[-length:] for p in range(len(text) - length))
            ),
            0,
        )
        found = run >= self.least
        looked_up = definition(window, {}, text, self.longest, self.least)[1:] if found else own
        self.proposed = [
            (0, own),
            (-1 if known is None else 1, chained),
            (run + 1 if found else -1, looked_up),
        ]
        self.since = len(text)
        return [window[0], *self.best(self.proposed)[1]]

    def best(self, proposed):
        """Of (kind, guesses) the one whose kind has most right guesses to a wrong one."""
        there = [one for one in proposed if one[0] >= 0]
        best = there[0]
        for one in there[1:]:
            (mine, against), (its, for_it) = self.odds[one[0]], self.odds[best[0]]
            best = one if mine * for_it >= its * against else best
        return best


def definition(window, known, text, longest, least):
    """What a row's window becomes, written out in lists."""
    for length in range(longest, 0, -1) if text else ():
        if length < least or length > len(text):
            continue
        for place in range(len(text) - length - 1, -1, -1):
            if text[place : place + length] == text[-length:]:
                since = text[place + length :]
                return window[:1] + [since[i % len(since)] for i in range(len(window) - 1)]
    made = window[:1]
    for own in window[1:]:
        made.append(known.get(made[-1], own))
    return made


def ways_on(text, longest, count):
    """[(guesses, tokens of the end before them)] of all ways that a text goes on in, the best
    first."""
    ways, begun = [], set()
    for length in range(min(longest, len(text) - 1), 0, -1):
        for place in range(len(text) - length - 1, -1, -1):
            if text[place : place + length] == text[-length:]:
                since = text[place + length :]
                if since[0] not in begun:
                    ways.append(([since[i % len(since)] for i in range(count)], length))
                begun.add(since[0])
    return ways


def several(window, known, text, longest, least, count, own_second, weighed=None):
    """[count] windows of a row; `known` is None without a pool, `weighed` counts if given."""
    own, length = window[1:], len(window) - 1
    found = ways_on(text, longest, length)[:count] if text else []
    ways = [guesses for guesses, run in found if run >= least]
    short = [guesses for guesses, run in found if run < least]
    if weighed is None:
        sources = [(3, way) for way in ways]
        if known is not None:
            sources.append((1, definition(window, known, [], 0, 1)[1:]))
        sources.append((0, own))
    else:
        weighed.take(window, known, text)
        left, sources = [one for one in weighed.proposed if one[0] >= 0], []
        while left:
            sources.append(weighed.best(left))
            left.remove(sources[-1])
        sources += [(3, way) for way in ways[1:]]
    picked = []
    if own_second:
        picked = [sources.pop(0)]
        if picked[0][0] != 0:
            picked.append(next(one for one in sources if one[0] == 0))
            sources.remove(picked[1])
    same = []
    for one in sources:
        begun = {guesses[0] for _, guesses in picked}
        (same if one[1][0] in begun else picked).append(one)
    made = [guesses for _, guesses in picked + same] + short
    return [[window[0], *guesses] for guesses in (made + [own] * count)[:count]]
