"""Guesses from the text itself: what followed when it last ended as it does now.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) as a
source of guesses for the window. Only shapes decide what runs, and nothing is read back.
"""

from __future__ import annotations

from typing import Any

import torch

from cllm_kernels.guess_window.reference import followed, latest_of_the_longest, repeated_ends


def look_up(
    sequences: torch.Tensor,
    generated: torch.Tensor,
    starts: torch.Tensor,
    *,
    longest: int,
    count: int,
    ways: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What followed the latest of the longest earlier occurrences of every row's end.

    With several `ways` to go on, each next one is that of the occurrences behind which another
    token stands than behind those before.

    A text that repeats itself is taken to go on doing so: where the earlier occurrence is less than
    `count` tokens back, the tokens since then follow again and again.

    Args:
        sequences: [B, L] int64, of row b the text in columns ``starts[b] .. generated[b] - 1``.
        generated: [B], at least ``starts + 1``.
        starts: [B].
        longest: most tokens of the end that are compared, at least 1.
        count: tokens to guess.

    Returns:
        (guesses [B, ways, count], length [B, ways]): how many tokens of the end were found again, 0
        where not even the last one was; such guesses mean nothing.
    """
    last = (generated - 1)[:, None]
    run = repeated_ends(sequences, last, starts[:, None], longest)
    score = latest_of_the_longest(run)
    following = sequences.roll(-1, dims=1)
    places, lengths = [], []
    for way in range(ways):
        found = score.argmax(dim=1, keepdim=True)
        lengths.append(torch.where(score.gather(1, found) >= 0, run.gather(1, found), 0))
        places.append(found)
        if way + 1 < ways:
            score = score.masked_fill(following == following.gather(1, found), -1)
    guesses = followed(sequences, last, torch.cat(places, dim=1), count)
    return guesses, torch.cat(lengths, dim=1)


class Lookup:
    """Puts guesses from the text into windows.

    Args:
        longest, least: most and fewest tokens of the end that must be found again.
        starts: [B] first column of every row's text.
    """

    def __init__(self, longest: int, least: int, starts: torch.Tensor):
        self.longest = longest
        self.least = least
        self.starts = starts

    def searched(
        self, sequences: torch.Tensor, generated: torch.Tensor, end: int
    ) -> dict[str, Any]:
        """What `cllm_kernels.guess_window` takes of the text; arguments as below."""
        return dict(
            sequences=sequences,
            generated=generated,
            starts=self.starts,
            longest=self.longest,
            least=self.least,
            end=end,
        )

    def several(
        self,
        window: torch.Tensor,
        sequences: torch.Tensor,
        generated: torch.Tensor,
        end: int,
        ways: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Guesses [B, ways, n - 1] behind a window's first token, and whether as much of the end as
        it takes was found again [B, ways].

        Args:
            window: [B, n], its first token the last committed one.
            sequences, generated: as `look_up` takes them.
            end: no row's text goes beyond this column.
        """
        guesses, length = look_up(
            sequences[:, :end],
            generated,
            self.starts,
            longest=self.longest,
            count=window.shape[1] - 1,
            ways=ways,
        )
        return guesses, length >= self.least
