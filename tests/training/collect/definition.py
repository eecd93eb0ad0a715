"""Jacobi trajectories as the paper defines them: one block after the other, one full forward an
iteration, no cache, nothing left out."""

from __future__ import annotations

from typing import Any

import torch

from cllm.fill import fill_table


@torch.no_grad()
def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """The model's own continuation, a full forward a token."""
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def guesses(
    prompt: list[int], count: int, fill: str, seed: int, vocabulary: int, pad: int
) -> list[int]:
    """The initial guess for the first `count` tokens behind a prompt, drawn for it alone."""
    table = fill_table(
        fill,
        prompts=torch.tensor([prompt]),
        prompt_lengths=torch.tensor([len(prompt)]),
        prompt_width=len(prompt),
        width=len(prompt) + count,
        seed=seed,
        vocab_size=vocabulary,
        pad_token_id=pad,
    )
    return table[0, len(prompt) :].tolist()


@torch.no_grad()
def block_states(
    model: Any,
    prompt: list[int],
    response: list[int],
    n: int,
    guess: list[int],
    *,
    forced: bool = False,
) -> list[list[list[int]]]:
    """Every state of every block, the fixed point last and once.

    Args:
        guess: initial guess for every token of the response.
        forced: the response is not the model's own; what lies before and at a state's first wrong
            token is put right all the same.
    """
    blocks = []
    for start in range(0, len(response), n):
        fixed = response[start : start + n]
        before = prompt + response[:start]
        states = [guess[start : start + len(fixed)]]
        while states[-1] != fixed:
            assert len(states) <= len(fixed), "no fixed point: the response is not greedy"
            logits = model(input_ids=torch.tensor([before + states[-1]])).logits[0]
            predicted = logits[len(before) - 1 : -1].argmax(dim=-1).tolist()
            if forced:
                pairs = zip(states[-1], fixed, strict=True)
                first = next(i for i, (left, right) in enumerate(pairs) if left != right)
                predicted[: first + 1] = fixed[: first + 1]
            states.append(predicted)
        blocks.append(states)
    return blocks
