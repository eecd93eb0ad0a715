"""Jacobi trajectories of all blocks of many responses at once.

The response is known, hence the text before every block, hence all blocks can iterate at the same
time (sequentially, block k + 1 starts where block k ended). One forward reads the texts and caches
them; then every iteration is one forward over guesses only.

Of a state whose first wrong token is d, predictions up to index d are those of the text itself. So
the forward is fed indices d .. m - 2 alone and predicts d + 1 .. m - 1: what is right already costs
nothing, and a finished block, or a response whose blocks all are, is not fed at all.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...fill import Fill, fill_table
from ..examples import BlockStates, TrainingExample
from .segments import SegmentForward, check_segments

# rows of hidden states whose logits are made at a time where the logits themselves are wanted
_LOGIT_ROWS = 256


@dataclass(frozen=True)
class Collected:
    """The trajectories of one response, and whether it was the model's own.

    Attributes:
        example: to be stored.
        mismatches: indices in the response of the tokens that are not the model's most likely
            ones. Their blocks iterate towards the response all the same.
        gaps: for each of them, by how much the likeliest token's logit exceeds its own. Near 0
            where rounding decides between two (16-bit models), large for another model's text.
        forwards: forward passes over noisy tokens of the batch that the response was in.
    """

    example: TrainingExample
    mismatches: list[int]
    gaps: list[float]
    forwards: int


@torch.no_grad()
def collect_states(
    model: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    block_size: int,
    fill: Fill = "prompt",
    seed: int = 0,
    ids: Sequence[str] | None = None,
    blocks: Sequence[list[int]] | None = None,
    pad_token_id: int = 0,
    max_rows: int = 16,
    max_tokens: int = 8192,
) -> list[Collected]:
    """The Jacobi trajectory of every block of every response.

    Equal, state by state, to iterating one block after the other from the same initial guess
    (CLLM, arXiv 2403.00835, section 3.1). A response's trajectories do not depend on the batch it
    is in, except for the rounding of 16-bit models.

    Args:
        model: a transformers causal language model in eval mode, on any device.
        prompts: token ids, at least one each.
        responses: the model's greedy continuations, at least one token each.
        block_size: n.
        fill: initial guesses, as `cllm.JacobiConfig.fill`: the same guesses that decoding in block
            mode starts from with the same seed. ``"last"`` repeats the token before the block.
        ids: names of the rows; their numbers if None.
        blocks: for each response, which of its blocks to collect, ascending (`sample_blocks`); all
            if None.
        max_rows, max_tokens: most responses, and most tokens, of one forward (a response that is
            longer by itself has a forward of its own).

    Returns:
        One entry a response, in the order given.

    Raises:
        ValueError: naming the argument and the row that is wrong.
        UnsupportedModelError: a model whose forward cannot be fed segments.
    """
    ids = [str(row) for row in range(len(prompts))] if ids is None else list(ids)
    _check(model, prompts, responses, ids, blocks, block_size, max_rows, max_tokens)
    check_segments(model)
    texts = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        count = -(-len(response) // block_size)
        wanted = list(range(count)) if blocks is None else list(blocks[row])
        texts.append(_Text(row, ids[row], list(prompt), list(response), wanted))
    collected: list[Collected | None] = [None] * len(texts)
    for group in _batches(texts, max_rows, max_tokens):
        run = _Run(model, group, block_size, fill, seed, pad_token_id)
        for text, entry in zip(group, run.collected(), strict=True):
            collected[text.row] = entry
    return [entry for entry in collected if entry is not None]


def sample_blocks(tokens: int, block_size: int, share: float, *, seed: int, id: str) -> list[int]:
    """A random share of a response's blocks, ascending: at least one, unless `share` is 0.

    Depends on the seed and the row's name only, so that a run that was cut short goes on alike.

    Args:
        tokens: T, the response's length.
        share: of its ceil(T / n) blocks, in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], not {share!r}")
    if share == 0:
        return []
    count = -(-tokens // block_size)
    wanted = min(count, max(1, round(share * count)))
    digest = hashlib.sha256(f"{seed}:{id}".encode("utf-8", "surrogatepass")).digest()
    return sorted(random.Random(int.from_bytes(digest[:8], "big")).sample(range(count), wanted))


@dataclass(frozen=True)
class _Text:
    row: int
    id: str
    prompt: list[int]
    response: list[int]
    blocks: list[int]

    @property
    def length(self) -> int:
        # the last token is an input of nothing
        return len(self.prompt) + len(self.response) - 1


def _batches(texts: list[_Text], max_rows: int, max_tokens: int) -> list[list[_Text]]:
    """Texts of like length together, so that little of a forward is padding."""
    groups: list[list[_Text]] = []
    for text in sorted(texts, key=lambda text: (-text.length, -len(text.response), text.row)):
        group = groups[-1] if groups else []
        # sorted, so the first is the longest
        if group and len(group) < max_rows and (len(group) + 1) * group[0].length <= max_tokens:
            group.append(text)
        else:
            groups.append([text])
    return groups


class _Run:
    """All blocks of one batch; block k stands at index k of every array, rows ascending.

    On the host (numpy): `row`, `start` (index in the response), `length` (m), `origin` (position of
    its first token in the text) and the first divergence d of the current states. On the device:
    `state` and `fixed`, [K, n], alike beyond a block's length.
    """

    def __init__(
        self,
        model: Any,
        texts: list[_Text],
        block_size: int,
        fill: Fill,
        seed: int,
        pad_token_id: int,
    ):
        self.texts, self.block_size, self.pad = texts, block_size, pad_token_id
        self.device = model.get_input_embeddings().weight.device
        vocabulary = model.get_input_embeddings().weight.shape[0]
        places = [(row, block) for row, text in enumerate(texts) for block in text.blocks]
        self.row = np.array([row for row, _ in places], dtype=np.int64)
        self.start = np.array([block * block_size for _, block in places], dtype=np.int64)
        sizes = np.array([len(text.response) for text in texts])
        prompt_sizes = np.array([len(text.prompt) for text in texts])
        self.length = np.minimum(block_size, sizes[self.row] - self.start)
        self.origin = prompt_sizes[self.row] + self.start
        self.fixed, self.state = self._initial(fill, seed, vocabulary)
        self.first = self._divergence()
        first = self.first.cpu().numpy()
        room = np.bincount(self.row, np.maximum(self.length - 1 - first, 0), minlength=len(texts))
        self.forward = SegmentForward(model, int(room.max()))
        self.host_first = first
        self.taken = np.zeros(len(places), dtype=np.int64)  # forwards that a block was in
        self.forwards = 0

    def _initial(self, fill: Fill, seed: int, vocabulary: int) -> tuple[Tensor, Tensor]:
        n, width = self.block_size, max(len(text.prompt) for text in self.texts)
        longest = max(len(text.response) for text in self.texts)
        padded = torch.zeros(len(self.texts), longest + n, dtype=torch.long)
        prompts = torch.zeros(len(self.texts), width, dtype=torch.long)
        for number, text in enumerate(self.texts):
            padded[number, : len(text.response)] = torch.tensor(text.response)
            prompts[number, : len(text.prompt)] = torch.tensor(text.prompt)
        table = fill_table(
            fill,
            prompts=prompts,
            prompt_lengths=torch.tensor([len(text.prompt) for text in self.texts]),
            prompt_width=width,
            width=width + longest + n,
            seed=seed,
            vocab_size=vocabulary,
            pad_token_id=self.pad,
        )
        row = torch.from_numpy(self.row)[:, None]
        columns = torch.from_numpy(self.start)[:, None] + torch.arange(n)
        fixed = padded[row, columns]
        if table is not None:
            guess = table[row, width + columns]
        else:
            before = [
                (text.prompt + text.response)[len(text.prompt) + block * n - 1]
                for text in self.texts
                for block in text.blocks
            ]
            guess = torch.tensor(before, dtype=torch.long)[:, None].expand_as(fixed)
        inside = torch.arange(n) < torch.from_numpy(self.length)[:, None]
        guess = torch.where(inside, guess, fixed)
        return fixed.to(self.device), guess.to(self.device)

    def _divergence(self) -> Tensor:
        """[K], the index of the first wrong token of every state; n where there is none."""
        wrong = self.state != self.fixed
        first = wrong.int().argmax(dim=1)
        return torch.where(wrong.any(dim=1), first, self.block_size)

    def collected(self) -> list[Collected]:
        """Read the texts, iterate to the end, and take the batch apart again."""
        mismatches = self._read()
        history = [self.state.int()]
        kept = np.arange(len(self.texts))  # rows still in the cache
        while True:
            active = np.flatnonzero(self.host_first < self.length - 1)
            if not active.size:
                break
            rows = np.unique(self.row[active])
            if len(rows) < len(kept):
                places = np.searchsorted(kept, rows)
                self.forward.keep(torch.from_numpy(places).to(self.device))
                kept = rows
            self._iterate(active, np.searchsorted(kept, self.row[active]), len(kept))
            history.append(self.state.int())
        return self._taken_apart(torch.stack(history).cpu().numpy(), mismatches)

    def _read(self) -> list[tuple[list[int], list[float]]]:
        """Cache the texts; per text, which tokens are not the likeliest, and the logits' gaps."""
        width = max(text.length for text in self.texts)
        tokens = torch.full((len(self.texts), width), self.pad, dtype=torch.long)
        wanted: list[int] = []
        place: list[int] = []
        for row, text in enumerate(self.texts):
            tokens[row, : text.length] = torch.tensor((text.prompt + text.response)[:-1])
            wanted += text.response
            place += range(row * width + len(text.prompt) - 1, row * width + text.length)
        hidden = self.forward.read(tokens.to(self.device)).flatten(0, 1)
        hidden = hidden[torch.tensor(place, device=self.device)]
        targets = torch.tensor(wanted, device=self.device)
        wrong = (self.forward.head.argmax(hidden) != targets).nonzero()[:, 0]
        found: list[float] = []
        for part in wrong.split(_LOGIT_ROWS):
            logits = self.forward.head.logits(hidden[part]).float()
            own = logits.gather(1, targets[part, None])[:, 0]
            found += (logits.amax(dim=1) - own).tolist()
        gaps = dict(zip(wrong.tolist(), found, strict=True))
        result, start = [], 0
        for text in self.texts:
            here = [index for index in range(len(text.response)) if start + index in gaps]
            result.append((here, [gaps[start + index] for index in here]))
            start += len(text.response)
        return result

    def _iterate(self, active: np.ndarray, rows: np.ndarray, batch: int) -> None:
        """One forward over the guesses of the blocks `active`, which stand in `rows` of the
        cache."""
        first = self.host_first[active]
        counts = self.length[active] - 1 - first
        ends = np.cumsum(counts)
        totals = np.bincount(rows, counts, minlength=batch).astype(np.int64)
        width = int(totals.max())
        offset = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        column = np.arange(ends[-1]) - np.repeat(np.cumsum(totals) - totals, totals)
        slot = np.repeat(rows, counts) * width + column
        index = np.repeat(first, counts) + offset
        # block, index in the block, position, visible; padding as `segments` wants it
        packed = np.tile(np.array([[-1], [0], [0], [1]]), batch * width)
        packed[0, slot] = np.repeat(active, counts)
        packed[1, slot] = index
        packed[2, slot] = np.repeat(self.origin[active], counts) + index
        packed[3, slot] = np.repeat(self.origin[active] + first, counts)
        block, inner, position, visible = torch.from_numpy(packed).to(self.device)
        slots = torch.from_numpy(slot).to(self.device)

        tokens = torch.where(block >= 0, self.state[block, inner], self.pad)
        shape = batch, width
        hidden = self.forward.segments(
            tokens.view(shape), block.view(shape), position.view(shape), visible.view(shape)
        )
        predictions = self.forward.head.argmax(hidden.flatten(0, 1)[slots])
        # what lies before and at the first wrong token is known; in blocks already finished too
        columns = torch.arange(self.block_size, device=self.device)
        state = torch.where(columns <= self.first[:, None], self.fixed, self.state)
        state[block[slots], inner[slots] + 1] = predictions
        self.state = state
        self.first = self._divergence()
        self.host_first = self.first.cpu().numpy()  # the iteration's one readback
        self.taken[active] += 1
        self.forwards += 1

    def _taken_apart(
        self, history: np.ndarray, mismatches: list[tuple[list[int], list[float]]]
    ) -> list[Collected]:
        """Trajectories from the snapshots [iterations + 1, K, n] of all states."""
        trajectories: list[list[BlockStates]] = [[] for _ in self.texts]
        fixed = self.fixed.cpu().numpy()
        for block, (row, length) in enumerate(zip(self.row, self.length, strict=True)):
            states = history[: self.taken[block] + 1, block, :length].tolist()
            right = fixed[block, :length].tolist()
            if states[-1] != right:
                states.append(right)  # predicted without a forward: all but its last token stood
            trajectories[row].append(BlockStates(states))
        return [
            Collected(
                TrainingExample(
                    id=text.id,
                    prompt=text.prompt,
                    response=text.response,
                    block_size=self.block_size,
                    blocks=blocks,
                    block_index=text.blocks,
                ),
                *mismatch,
                forwards=self.forwards,
            )
            for text, blocks, mismatch in zip(self.texts, trajectories, mismatches, strict=True)
        ]


def _check(
    model: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    ids: Sequence[str],
    blocks: Sequence[list[int]] | None,
    block_size: int,
    max_rows: int,
    max_tokens: int,
) -> None:
    if model.training:
        raise ValueError(
            "the model is in training mode, where dropout makes every forward different; call "
            "model.eval() first"
        )
    for name, value in (
        ("block_size", block_size), ("max_rows", max_rows), ("max_tokens", max_tokens)
    ):  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, not {value!r}")
    for name, rows in (("responses", responses), ("ids", ids), ("blocks", blocks)):
        if rows is not None and len(rows) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts but {len(rows)} {name}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        named = f"row {row} (id {ids[row]})"
        for what, tokens in (("prompt", prompt), ("response", response)):
            if not tokens:
                raise ValueError(f"the {what} of {named} is empty; leave the row out")
            wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
            if wrong is not None:
                raise ValueError(
                    f"the {what} of {named} holds the token id {wrong}, outside the model's "
                    f"vocabulary of {vocabulary}; was it made by another tokenizer?"
                )
        length = len(prompt) + len(response)
        if context is not None and length > context:
            raise ValueError(
                f"{named} has {len(prompt)} prompt and {len(response)} response tokens, more than "
                f"the model's context of {context}; shorten or drop it"
            )
        count = -(-len(response) // block_size)
        if (
            blocks is not None
            and blocks[row]
            and (
                blocks[row] != sorted(set(blocks[row]))
                or not 0 <= blocks[row][0] <= blocks[row][-1] < count
            )
        ):
            raise ValueError(
                f"blocks of {named} must be ascending numbers from 0 to {count - 1}, not "
                f"{blocks[row]}"
            )
