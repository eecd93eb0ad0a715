"""Guesses from what the model has said before: after each token, the token that it predicted last.

Every forward predicts a token behind every token of its window, the wrong guesses included, and
throws most of them away. Kept, they say what the model likes to put behind a token (the n-gram pool
of lookahead decoding, Fu et al. 2024, arXiv 2402.02057, with n = 2, and rejected predictions in
it); the prompt's own pairs are there from the start.
"""

from __future__ import annotations

import copy

import torch

import cllm_kernels


class GuessPool:
    """For every row and every token of the vocabulary, the latest token behind it.

    8 bytes a row and token, whatever the length of the text. Only shapes decide what runs, nothing
    is read back, and what is kept does not depend on the order in which a device writes.

    Attributes:
        latest: [B, V] as `cllm_kernels.guess_window` and `guess_candidates` read it.

    Args:
        prompts: [B, P] int64, right-padded.
        lengths: [B] their tokens.
        vocabulary: V.
    """

    def __init__(self, prompts: torch.Tensor, lengths: torch.Tensor, vocabulary: int):
        batch, width = prompts.shape
        # [B, V] stamp * V + token, so that the latest of several is the largest; -1: none yet
        self.latest = prompts.new_full((batch, vocabulary), -1)
        # on the device, as a captured iteration goes on from where it was at each replay
        self._stamps = prompts.new_full((batch,), width)
        places = torch.arange(width - 1, device=prompts.device)
        pairs = places * vocabulary + prompts[:, 1:]
        pairs = pairs.masked_fill(places >= (lengths - 1)[:, None], -1)
        self.latest.scatter_reduce_(1, prompts[:, :-1], pairs, "amax")

    def add(self, window: torch.Tensor, predictions: torch.Tensor) -> None:
        """Keep the predictions [B, n] behind the tokens of a window [B, n]."""
        cllm_kernels.guess_pool_add(self.latest, self._stamps, window, predictions)

    def clone(self) -> GuessPool:
        """One of its own that knows the same."""
        made = copy.copy(self)
        made.latest, made._stamps = self.latest.clone(), self._stamps.clone()
        return made

    def load(self, other: GuessPool) -> None:
        """Know what `other`, of the same batch and vocabulary, does, in the same memory."""
        self.latest.copy_(other.latest)
        self._stamps.copy_(other._stamps)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.latest.nbytes + self._stamps.nbytes
