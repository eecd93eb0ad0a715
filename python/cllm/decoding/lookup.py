"""Guesses from the text itself: what followed when it last ended as it does now.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) as a
source of guesses for the window.
"""

from __future__ import annotations

from typing import Any

import torch


class Lookup:
    """How the text is searched for guesses.

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
        """What `cllm_kernels.guess_window` and `guess_candidates` take of the text."""
        return dict(
            sequences=sequences,
            generated=generated,
            starts=self.starts,
            longest=self.longest,
            least=self.least,
            end=end,
        )
