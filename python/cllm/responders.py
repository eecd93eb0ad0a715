"""Greedy responses to many prompts, by our own decoder or by HuggingFace's ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from .decoding import JacobiConfig, generate

Engine = Literal["jacobi", "huggingface"]

# prompts' token ids and the most new tokens -> per prompt the new token ids, up to and including
# its end-of-text token
Responder = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


def make_responder(model: Any, engine: Engine = "jacobi", *, block_size: int = 16) -> Responder:
    """A function that continues a batch of prompts by the model's own argmax.

    Whatever the model's generation config asks for beside its end-of-text tokens (sampling,
    penalties, banned words) is left out: only the argmax is a fixed point of Jacobi iteration.

    Args:
        model: in eval mode, on its device.
        engine: ``"jacobi"`` our decoder, ``"huggingface"`` the model's ``generate``.
        block_size: window of the Jacobi decoder; it changes the speed, not the text.

    Raises:
        ValueError: if there is no such engine; from the function, if a logit is NaN.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}, not {engine!r}")
    config = JacobiConfig(block_size=block_size)
    ends = end_tokens(model)
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else (min(ends) if ends else 0)

    settled = False

    def respond(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        nonlocal settled
        if not prompts:
            return []
        if not settled:
            _settle(model, prompts[0], engine, config, pad)
            settled = True
        input_ids, mask = left_padded(prompts, pad)
        inputs: dict[str, Any] = {
            "input_ids": input_ids.to(model.device),
            "attention_mask": mask.to(model.device),
            "max_new_tokens": max_new_tokens,
        }
        with plain_generation(model, pad), no_nan(model):
            if engine == "jacobi":
                sequences = generate(model, config=config, **inputs)
            else:
                sequences = model.generate(**inputs)
        width = input_ids.shape[1]
        return [up_to_end(row[width:].tolist(), ends) for row in sequences]

    return respond


@torch.no_grad()
def _settle(
    model: Any, prompt: Sequence[int], engine: Engine, config: JacobiConfig, pad: int
) -> None:
    """See that the model gives numbers, and let the decoder choose how to feed it.

    The decoder tries ways of feeding it that may give NaN, which `no_nan` must not see.
    """
    tokens = torch.tensor([list(prompt)], device=model.device)
    with no_nan(model):
        model(input_ids=tokens, use_cache=False)
    if engine == "jacobi":
        with plain_generation(model, pad):
            generate(model, tokens, max_new_tokens=1, config=config)


def end_tokens(model: Any) -> frozenset[int]:
    """The ids that end a text of `model`; empty where its generation config names none."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [int(ends)])


def up_to_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """`tokens` up to and including the first of `ends`."""
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their attention mask, both [B, P] int64, padded on the left with `pad`."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@contextmanager
def no_nan(model: Any) -> Iterator[None]:
    """Raises ValueError on leaving if a forward of `model` meanwhile gave a NaN among its logits.

    The argmax of NaN is a token like any other, so nothing else would tell.
    """
    seen: list[torch.Tensor] = []

    def look(module: Any, arguments: Any, output: Any) -> None:
        found = output.logits.isnan().any()
        seen[:] = [seen[0] | found] if seen else [found]

    hook = model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()
    if seen and bool(seen[0]):
        raise ValueError(
            f"the model gives NaN logits in {str(model.dtype).removeprefix('torch.')}: its weights "
            "are damaged, or the precision is too low for it; try --dtype bfloat16 or float32"
        )


@contextmanager
def plain_generation(model: Any, pad: int) -> Iterator[None]:
    """The model's generation config cut down to greedy search and its end-of-text tokens."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=pad,
    )
    try:
        yield
    finally:
        model.generation_config = own
