"""Jacobi decoding of a toy language, by the project's own `jacobi_step`, recorded as it runs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import torch

import cllm_kernels
from cllm.trajectory import Iteration, Trajectory

NextToken = Callable[[Sequence[int]], int]


def toy_next_token(seed: int, vocabulary: int, memory: int) -> NextToken:
    """A deterministic language: the next token hangs on the last `memory` tokens alone."""

    def next_token(prefix: Sequence[int]) -> int:
        key = repr((seed, list(prefix[-memory:] if memory else []), len(prefix) if seed % 2 else 0))
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % vocabulary

    return next_token


def one_by_one(
    next_token: NextToken, prompt: list[int], limit: int, stops: Sequence[int] = ()
) -> list[int]:
    """The text that one-token decoding gives."""
    tokens: list[int] = []
    while len(tokens) < limit:
        tokens.append(next_token(prompt + tokens))
        if tokens[-1] in stops:
            break
    return tokens


def simulate(
    next_token: NextToken,
    prompt: list[int],
    limit: int,
    block_size: int,
    *,
    mode: str = "sliding",
    accept: str = "all",
    stops: Sequence[int] = (),
    fill: Callable[[int], int] = lambda index: 0,
) -> Trajectory:
    """Decode one prompt; `fill` gives the guess for a position of the text that has no draft."""
    fills = torch.tensor([[fill(index) for index in range(limit + block_size)]])
    window = torch.cat((torch.tensor([[prompt[-1]]]), fills[:, : block_size - 1]), dim=1)
    output = torch.zeros(1, limit, dtype=torch.int64)
    lengths = torch.tensor([len(prompt) - 1])
    generated, progress = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    done, limits = torch.zeros(1, dtype=torch.bool), torch.tensor([limit])
    iterations = []
    while not bool(done):
        position = int(generated - progress)
        final = [*prompt, *output[0, :position].tolist()]
        fed = window[0].tolist()
        drafted = [next_token([*final, *fed[1 : index + 1]]) for index in range(block_size)]
        exact = int(progress) + 1
        while accept == "all" and exact < block_size and fed[exact] == drafted[exact - 1]:
            exact += 1
        accepted = cllm_kernels.jacobi_step(
            window,
            torch.tensor([drafted]),
            output,
            lengths,
            generated,
            progress,
            done,
            limits,
            torch.tensor(list(stops), dtype=torch.int64),
            fills,
            mode=mode,
            accept=accept,
        )
        iterations.append(Iteration(position, fed, drafted, exact, int(accepted)))
    tokens = output[0, : int(generated)].tolist()
    return Trajectory(prompt, tokens, iterations, block_size, mode)


def spoken(
    text: str,
    *,
    block_size: int = 8,
    mode: str = "sliding",
    prompt_text: str | None = "How many eggs?",
) -> Trajectory:
    """A trajectory whose final text is `text`: a model that errs where its context is wrong."""
    words = re.findall(r"\s?\w+|\s|[^\w\s]", text)
    vocabulary = sorted(set(words) | {" the", " of", "\n", "."})
    ids = {word: index for index, word in enumerate(vocabulary)}
    stop = len(vocabulary)
    truth = [*(ids[word] for word in words), stop]
    wrong = [ids[word] for word in (" the", " of", "\n", ".")]
    prompt = [1000, 1001]

    def next_token(prefix: Sequence[int]) -> int:
        written = list(prefix[len(prompt) :])
        place = min(len(written), len(truth) - 1)
        luck = int(hashlib.sha256(repr((written[-2:], place)).encode()).hexdigest(), 16)
        if written == truth[:place]:
            return truth[place]
        known = sum(
            ours == theirs
            for ours, theirs in zip(written[-3:], truth[max(place - 3, 0) : place], strict=False)
        )
        if luck % 10 < 2 + 2 * known:
            return truth[place]
        return wrong[luck % len(wrong)]

    trajectory = simulate(
        next_token,
        prompt,
        len(truth),
        block_size,
        mode=mode,
        stops=[stop],
        fill=lambda index: wrong[index % len(wrong)],
    )
    trajectory.pieces = {index: word for word, index in ids.items()} | {stop: "<|im_end|>"}
    trajectory.prompt_text = prompt_text
    return trajectory
