"""`cllm.generate`: HuggingFace's ``generate`` with Jacobi iteration as its loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from .checks import check_surroundings
from .config import FIELDS, JacobiConfig
from .decode import jacobi_decode
from .output import JacobiOutput
from .support import UnsupportedOptionError, check_model


def generate(
    model: Any,
    *args: Any,
    config: JacobiConfig | None = None,
    adapter: Any = None,
    **kwargs: Any,
) -> torch.Tensor | JacobiOutput:
    """Generate text by Jacobi decoding: the tokens of one-token decoding, in fewer forwards.

    Takes what ``model.generate`` takes (``input_ids`` [B, P] left-padded, ``attention_mask``,
    ``max_new_tokens``, ``generation_config``, ``logits_processor``, ``stopping_criteria``,
    ``stop_strings`` with ``tokenizer``, ``streamer``, ...) and every field of `JacobiConfig` as a
    keyword. The model's own ``generation_config`` is honoured; nothing on the model is changed.

    With ``do_sample=True`` the text is a sample, distributed as the model and its processors say,
    and the same for every block size, mode and batch with the same ``seed`` (``generator`` and
    ``row_ids``: see `jacobi_decode`).

    Args:
        model: a decoder-only transformers model in eval mode, patched or not.
        config: settings; keywords named like its fields replace them one by one.
        adapter: makes the guesses and leaves the text alone: a `cllm.GatedAdapter`, its folder or
            hub id (load it once if you call often), or a PEFT model around the same base.

    Returns:
        [B, P + T] int64 as HuggingFace's ``generate``, or `JacobiOutput` with
        ``return_dict_in_generate=True``.

    Raises:
        UnsupportedModelError, UnsupportedOptionError, ValueError: as `jacobi_decode`.
    """
    from ..patching import original_generate

    huggingface_generate = original_generate(model)
    return run_generate(
        model, huggingface_generate, config or JacobiConfig(), adapter, args, kwargs
    )


def run_generate(
    model: Any,
    huggingface_generate: Any,
    config: JacobiConfig,
    adapter: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor | JacobiOutput:
    """Call `huggingface_generate` with `jacobi_decode` as its loop."""
    kwargs = dict(kwargs)
    config = config.updated(**{name: kwargs.pop(name) for name in FIELDS if name in kwargs})
    check_model(model)
    if kwargs.get("custom_generate") is not None:
        raise UnsupportedOptionError("custom_generate", "it is a decoding loop itself")
    for name in ("assistant_model", "inputs_embeds", "position_ids", "negative_prompt_ids"):
        if kwargs.get(name) is not None:
            raise UnsupportedOptionError(name, "it decodes one model from token ids")
    check_surroundings(model, args, kwargs)
    _take_stop_strings(model, args, kwargs)
    streamer = kwargs.pop("streamer", None)
    keys = {name: kwargs.pop(name, None) for name in ("generator", "row_ids")}
    # generate() would keep the streamer from a custom loop after showing it the prompt
    decode = partial(jacobi_decode, config=config, adapter=adapter, token_streamer=streamer, **keys)
    return huggingface_generate(*args, custom_generate=decode, **kwargs)


def _take_stop_strings(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Turn ``stop_strings`` into a criterion: generate() loses the tokenizer of a custom loop."""
    tokenizer = kwargs.pop("tokenizer", None)
    # the second argument of generate(), where it is given by its place
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    sources = (kwargs.get("stop_strings"), getattr(given, "stop_strings", None))
    own = getattr(model.generation_config, "stop_strings", None)
    strings = next((strings for strings in (*sources, own) if strings is not None), None)
    if strings is None:
        return
    if tokenizer is None:
        raise ValueError(
            f"stop_strings={strings!r} needs the tokenizer; pass tokenizer=tokenizer as well"
        )
    kwargs["stop_strings"] = None  # a keyword outdoes every generation config
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    kwargs["stopping_criteria"] = criteria
