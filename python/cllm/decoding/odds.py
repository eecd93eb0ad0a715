"""Which source a row's guesses come from: the one that has been right most often in its text.

What a window's own left-over predictions are worth hangs on the model: a base model's are hardly
ever right, a consistency LLM's (CLLM, arXiv 2403.00835) may be more often than anything that
stands in the text (docs/performance.md). So none of them comes first as such. Every source's
proposals are compared with what the text becomes, whether they were taken or not, and how often a
kind of guess was right for each time it was wrong decides from then on.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from cllm_kernels.guess_window.reference import GUESS

# Right guesses for a wrong one that are believed in before anything is seen, set by hand, in the
# order that suits base weights: of the window's own, an adapter's, the pool's, and of text whose
# end was found again with 1, 2, ... tokens.
_OWN, _ADAPTER, _POOL = 0.2, 0.9, 0.55
_TEXT = (0.5, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0)
# wrong guesses that this belief is worth; text of a kind is seen less often
_SEEN, _SEEN_TEXT = 2, 4


class GuessOdds:
    """What `cllm_kernels.guess_window` and `guess_candidates` keep of every row's sources.

    On the device and of fixed shape, so that a graph can carry it; nothing is read back.

    Attributes:
        odds: [B, 2 + longest, 2], proposed [B, 3, n], since [B]: as these ops have them.

    Args:
        batch: B.
        width: n.
        longest: most tokens of a text's end that are looked up; 0: none are.
        gated: the window's own guesses are an adapter's.
        device: of the window.
        known: `learnt` of calls with the same sources; None: nothing is.
    """

    def __init__(
        self,
        batch: int,
        width: int,
        longest: int,
        *,
        gated: bool,
        device: torch.device,
        known: torch.Tensor | None = None,
    ):
        text = [*_TEXT, *[_TEXT[-1]] * longest][:longest]
        kinds = [(_ADAPTER if gated else _OWN, _SEEN), (_POOL, _SEEN)]
        kinds += [(run, _SEEN_TEXT) for run in text]
        counts = [[round(run * seen * GUESS), seen * GUESS] for run, seen in kinds]
        start = torch.tensor(counts, device=device) if known is None else known
        self.odds = start.to(device).repeat(batch, 1, 1)
        self.proposed = torch.full((batch, 3, width), -1, device=device)
        self.since = torch.full((batch,), -1, device=device)

    @property
    def kept(self) -> dict[str, Any]:
        """What these ops take of it."""
        return dict(odds=self.odds, proposed=self.proposed, since=self.since)

    def learnt(self) -> torch.Tensor:
        """[2 + longest, 2] int64 on the host: the counts of a row, on average over all."""
        return self.odds.float().mean(dim=0).round().long().cpu()

    def clone(self) -> GuessOdds:
        """One of its own that knows the same."""
        made = copy.copy(self)
        made.odds, made.proposed = self.odds.clone(), self.proposed.clone()
        made.since = self.since.clone()
        return made

    def load(self, other: GuessOdds) -> None:
        """Know what `other`, of the same shapes, does, in the same memory."""
        self.odds.copy_(other.odds)
        self.proposed.copy_(other.proposed)
        self.since.copy_(other.since)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.odds.nbytes + self.proposed.nbytes + self.since.nbytes
