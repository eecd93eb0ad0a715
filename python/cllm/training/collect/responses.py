"""The responses that trajectories are collected for: made here, or brought and put into tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...prompts import PromptError

# prompts' token ids and the most new tokens -> per prompt the new ids, its end-of-text included
Responder = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


def respond(
    responder: Responder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    context: int | None = None,
) -> list[list[int]]:
    """Greedy responses in the prompts' order.

    Prompts of like length are batched together. One that the context leaves less than
    `max_new_tokens` is answered alone, up to the context's end.

    Args:
        responder: answers one batch.
        prompts: token ids, each shorter than `context`.
        context: positions of the model; None: no limit.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    room = max_new_tokens if context is None else context - max_new_tokens
    whole = [i for i in order if context is None or len(prompts[i]) <= room]
    batches = [
        (whole[start : start + batch_size], max_new_tokens)
        for start in range(0, len(whole), batch_size)
    ]
    if context is not None:
        batches += [([i], context - len(prompts[i])) for i in order if len(prompts[i]) > room]
    responses: list[list[int]] = [[] for _ in prompts]
    for members, limit in batches:
        answers = responder([prompts[index] for index in members], limit)
        for index, answer in zip(members, answers, strict=True):
            responses[index] = list(answer)
    return responses


def with_end(
    responder: Responder,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[list[int]],
    *,
    ends: frozenset[int],
    batch_size: int,
    context: int | None = None,
) -> list[list[int]]:
    """Brought responses, each with its end-of-text token where the model ends its text there.

    Engines leave that token out of what they return. Whether a text ended or was cut is the
    model's to say: its next token is asked for.
    """
    open_ended = [
        index
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        if response
        and response[-1] not in ends
        and (context is None or len(prompt) + len(response) < context)
    ]
    texts = [[*prompts[index], *responses[index]] for index in open_ended]
    following = respond(responder, texts, max_new_tokens=1, batch_size=batch_size, context=context)
    completed = [list(response) for response in responses]
    for index, tokens in zip(open_ended, following, strict=True):
        completed[index] += [token for token in tokens if token in ends]
    return completed


def brought_tokens(
    tokenizer: Any,
    prompt: Sequence[int],
    response: str | Sequence[int],
    *,
    vocab_size: int,
    ends: frozenset[int],
    where: str,
) -> list[int]:
    """A brought response as token ids that continue `prompt`, up to its first end-of-text token.

    Text is put into tokens behind the prompt's last tokens, because a tokenizer may treat the
    beginning of a text in its own way (a space in front, a token for the beginning).

    Args:
        response: text, or token ids, which are taken as they are.
        vocab_size: ids must lie below it.
        where: names the row in an error.

    Raises:
        PromptError: if an id is not in the vocabulary.
    """
    tokens = _continuation(tokenizer, prompt, response) if isinstance(response, str) else response
    bad = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise PromptError(
            f"the response of {where} has the token id {bad}, but the model's vocabulary has "
            f"{vocab_size} entries"
        )
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: stop + 1])


def _continuation(tokenizer: Any, prompt: Sequence[int], response: str) -> list[int]:
    # behind the prompt's last tokens: enough of them to be past a beginning, few enough to be cheap
    tail = tokenizer.decode(list(prompt[-8:]), skip_special_tokens=False)
    front = tokenizer(tail, add_special_tokens=False)["input_ids"]
    both = tokenizer(tail + response, add_special_tokens=False)["input_ids"]
    if both[: len(front)] == front:
        return both[len(front) :]
    # the two grew together where they meet, which the model's own text cannot have done
    return tokenizer(response, add_special_tokens=False)["input_ids"]
