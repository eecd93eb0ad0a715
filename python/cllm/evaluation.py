"""How fast a model decodes held-out prompts, and what that cost in quality: one measurement for the
training loop, the command line and the published tables.

A model that repeats itself is easy to guess and so decodes in few forward passes. Tokens per
forward therefore never come alone: beside them stand the negative log-likelihood of the text under
the base model, its repetition, and its agreement with the base model's own text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .adapter import resolve_adapter
from .adapter.peft_model import adapters_off
from .decoding import JacobiConfig, JacobiOutput, generate
from .head import LanguageHead, evaluating
from .prompts import Prompt, check_length, encode
from .responders import end_tokens, left_padded
from .text_quality import repeated_ngrams

# rows whose logits [rows, V] exist at a time while a text is scored
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Evaluation:
    """Measures of one model's greedy texts over held-out prompts.

    Attributes:
        prompts: how many texts.
        tokens: generated tokens of all texts, end-of-text tokens included.
        forwards: forward passes that the texts took part in, every one counted but the prefill.
        tokens_per_forward: ``tokens / forwards``.
        exact_match: share of the texts equal to the reference, token by token; None without one.
        equal_leading: mean over the texts of the share of leading tokens that equal the
            reference's, of the longer of the two; None without a reference.
        nll_under_base: mean negative log-likelihood per token, in nats, of the texts under the base
            model given the prompt (all tokens of all texts alike); None without a base model.
        base_nll: the same of the reference texts.
        repetition: mean over the texts of the share of 4-grams that stood in the text before
            (`cllm.text_quality.repeated_ngrams`).
        base_repetition: the same of the reference texts.
        mean_length: tokens a text.
        cut: share of the texts that the length limit ended.
        fast_forwarded: mean over the texts of the tokens that came beyond the first of their
            forward pass (arXiv 2403.00835, section 4.3).
        stationary: mean over the texts of tokens that were drafted right, and stayed so, while a
            token before them was wrong, each counted in every pass that drafted it so.
        seconds: wall-clock seconds of decoding, the scoring left out.
        responses: the texts' token ids, in the order of the prompts.
    """

    prompts: int
    tokens: int
    forwards: int
    tokens_per_forward: float
    exact_match: float | None
    equal_leading: float | None
    nll_under_base: float | None
    base_nll: float | None
    repetition: float
    base_repetition: float | None
    mean_length: float
    cut: float
    fast_forwarded: float
    stationary: float
    seconds: float
    responses: list[list[int]] = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of decoding."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def metrics(self) -> dict[str, float]:
        """Every number that is there, by name; for a log."""
        values = asdict(self)
        del values["responses"]
        values["tokens_per_second"] = self.tokens_per_second
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class DecodedText:
    """One prompt's text, decoded.

    Attributes:
        tokens: generated token ids.
        forwards: forward passes it took part in.
        fast_forwarded, stationary: see `Evaluation`.
        ended: whether an end-of-text token ended it, not the length limit.
    """

    tokens: list[int]
    forwards: int
    fast_forwarded: int
    stationary: int
    ended: bool


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt | str | Sequence[int] | Tensor],
    *,
    references: Sequence[Sequence[int]] | None = None,
    base: Any = None,
    adapter: Any = None,
    config: JacobiConfig | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> Evaluation:
    """Decode held-out prompts by Jacobi iteration and measure speed and quality.

    Args:
        model: a causal language model; it is put in evaluation mode and back.
        tokenizer: encodes prompts that are text (as a chat turn where it has a template) and pads.
        prompts: `Prompt`, text, or token ids [P].
        references: token ids of the base model's (or the teacher's) greedy texts. None: decoded
            with the base model, where there is one.
        base: the model whose likelihood judges the texts. None: for a PEFT model, the same model
            with its adapters off, and so with `adapter`; for any other, no likelihood.
        adapter: makes the guesses of gated decoding, see `cllm.generate`; the base model's own
            texts are decoded without it.
        config: of Jacobi decoding. None: windows of 16 on every device, and nothing is looked up in
            the text, so that tokens per forward are what the model itself is worth.
        max_new_tokens: length limit of a text.
        batch_size: prompts that are decoded together.

    Raises:
        ValueError: no prompts, an empty or too long prompt, or references that do not fit.
    """
    ids = encode_prompts(model, tokenizer, prompts)
    if references is not None and len(references) != len(ids):
        raise ValueError(f"there are {len(ids)} prompts but {len(references)} references")
    settings: dict[str, Any] = {
        "config": config or JacobiConfig(block_size=16, lookup=0),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    started = time.perf_counter()
    texts = decode_texts(model, tokenizer, ids, adapter=adapter, **settings)
    seconds = time.perf_counter() - started
    alone: AbstractContextManager[None] = nullcontext()
    if base is None and adapter is not None:
        base, alone = model, adapters_off(model)
    with alone, base_model(model, base) as judge:
        if references is None and judge is not None:
            settings["config"] = replace(settings["config"], verify_size=None)  # an adapter's
            decoded = decode_texts(judge, tokenizer, ids, **settings)
            references = [text.tokens for text in decoded]
        own = base_own = None
        if judge is not None:
            own = negative_log_likelihoods(judge, ids, [t.tokens for t in texts], batch_size)
            if references is not None:
                base_own = negative_log_likelihoods(judge, ids, references, batch_size)
    return summarise(texts, references, own, base_own, seconds)


def summarise(
    texts: Sequence[DecodedText],
    references: Sequence[Sequence[int]] | None,
    nll: Sequence[float] | None,
    reference_nll: Sequence[float] | None,
    seconds: float,
) -> Evaluation:
    """`Evaluation` of decoded texts.

    Args:
        references: the base model's texts, where known.
        nll: summed negative log-likelihood of each text; `reference_nll`: of each reference.
        seconds: of decoding.
    """
    responses = [list(text.tokens) for text in texts]
    tokens = sum(map(len, responses))
    forwards = sum(text.forwards for text in texts)
    count = len(texts)
    pairs = [] if references is None else list(zip(responses, references, strict=True))
    return Evaluation(
        prompts=count,
        tokens=tokens,
        forwards=forwards,
        tokens_per_forward=tokens / max(forwards, 1),
        exact_match=_mean([float(a == list(b)) for a, b in pairs]),
        equal_leading=_mean([equal_leading_share(a, b) for a, b in pairs]),
        nll_under_base=_per_token(nll, responses),
        base_nll=None if references is None else _per_token(reference_nll, references),
        repetition=_mean([repeated_ngrams(text) for text in responses]) or 0.0,
        base_repetition=_mean([repeated_ngrams(text) for text in references or []]),
        mean_length=tokens / max(count, 1),
        cut=sum(not text.ended for text in texts) / max(count, 1),
        fast_forwarded=sum(text.fast_forwarded for text in texts) / max(count, 1),
        stationary=sum(text.stationary for text in texts) / max(count, 1),
        seconds=seconds,
        responses=responses,
    )


def encode_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt | str | Sequence[int] | Tensor]
) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        ValueError: if there are none, or one is empty or leaves no room in the model's context.
    """
    if not len(prompts):
        raise ValueError("there are no prompts to evaluate on; give at least one")
    encoded = []
    for index, given in enumerate(prompts):
        prompt = Prompt(str(index), "", index + 1)
        if isinstance(given, (Prompt, str)):
            prompt = Prompt(str(index), given) if isinstance(given, str) else given
            ids = encode(tokenizer, prompt)
        else:
            ids = torch.as_tensor(given, dtype=torch.int64)
        if ids.dim() != 1 or ids.numel() == 0:
            raise ValueError(f"prompt {index} must be token ids [P], P >= 1, not {list(ids.shape)}")
        check_length(model, prompt, ids)
        encoded.append(ids.tolist())
    return encoded


@torch.no_grad()
def decode_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    config: JacobiConfig,
    max_new_tokens: int,
    batch_size: int,
    adapter: Any = None,
) -> list[DecodedText]:
    """Greedy texts of encoded prompts by Jacobi decoding, `batch_size` of like length at a time;
    with `adapter`, gated (see `cllm.generate`)."""
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size and max_new_tokens must be at least 1, not {batch_size} and "
            f"{max_new_tokens}"
        )
    if adapter is not None:
        adapter = resolve_adapter(adapter)  # a folder is read once
    config = config.updated(record_trajectories=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pad = 0 if pad is None else int(pad)
    device = model.get_input_embeddings().weight.device
    found: dict[int, DecodedText] = {}
    with evaluating(model):
        for rows in _batches(prompts, batch_size):
            ids, mask = left_padded([prompts[row] for row in rows], pad)
            out = generate(
                model,
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                config=config,
                adapter=adapter,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                return_dict_in_generate=True,
            )
            assert isinstance(out, JacobiOutput) and out.trajectories is not None
            assert out.iterations is not None
            for row, trajectory, forwards in zip(
                rows, out.trajectories, out.iterations.tolist(), strict=True
            ):
                found[row] = DecodedText(
                    tokens=list(trajectory.tokens),
                    forwards=forwards,
                    fast_forwarded=sum(trajectory.fast_forwarded),
                    stationary=sum(trajectory.stationary),
                    ended=len(trajectory.tokens) < max_new_tokens
                    or trajectory.tokens[-1] in end_tokens(model),
                )
    return [found[row] for row in range(len(prompts))]


@torch.no_grad()
def negative_log_likelihoods(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    batch_size: int = 8,
) -> list[float]:
    """-log p(response | prompt) under `model`, in nats, summed over each response's tokens.

    One forward over the decoder a batch; logits, in fp32, exist for a few hundred rows at a time.

    Args:
        prompts: token ids, at least one each.
        responses: token ids; an empty response has likelihood 1.
    """
    head = LanguageHead.of(model)
    device = model.get_input_embeddings().weight.device
    weight = head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    texts = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    totals = [0.0] * len(texts)
    with evaluating(model):
        for rows in _batches(texts, batch_size):
            width = max(len(texts[row]) for row in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            columns: list[int] = []
            owners: list[int] = []
            for line, row in enumerate(rows):
                ids[line, : len(texts[row])] = torch.tensor(texts[row])
                mask[line, : len(texts[row])] = 1
                first = line * width + len(prompts[row]) - 1
                columns.extend(range(first, first + len(responses[row])))
                owners.extend([line] * len(responses[row]))
            if not columns:
                continue
            # right-padded: behind a text's end nothing is read, and before it nothing changes
            hidden = head.hidden_states(input_ids=ids.to(device), attention_mask=mask.to(device))
            places = torch.tensor(columns, device=device)
            inputs = head.scaled(hidden.flatten(0, 1)[places].float())
            labels = ids.flatten().to(device)[places + 1]
            scores = torch.cat(
                [
                    _cross_entropy(inputs[part], labels[part], weight, bias, head.softcap)
                    for part in torch.arange(len(columns), device=device).split(_CHUNK_ROWS)
                ]
            )
            sums = torch.zeros(len(rows), dtype=torch.float64)
            sums.index_add_(0, torch.tensor(owners), scores.double().cpu())
            for line, row in enumerate(rows):
                totals[row] = float(sums[line])
    return totals


@contextmanager
def base_model(model: Any, base: Any) -> Iterator[Any]:
    """`base`; where it is None, a PEFT `model` with its adapters off, and for other models None."""
    adapters_off = getattr(model, "disable_adapter", None)
    if base is None and callable(adapters_off) and hasattr(model, "peft_config"):
        with adapters_off():
            yield model
    else:
        with nullcontext():
            yield base


def equal_leading_share(text: Sequence[int], reference: Sequence[int]) -> float:
    """Leading tokens that two texts share, as a share of the longer one; 1.0 for equal texts."""
    pairs = zip(text, reference, strict=False)
    shorter = min(len(text), len(reference))
    equal = next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)
    longer = max(len(text), len(reference))
    return equal / longer if longer else 1.0


def _cross_entropy(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """[rows] of hidden [rows, H], weight [V, H], labels [rows]."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _batches(texts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers, the longest texts first: rows of like length waste little padding, and what does
    not fit into memory fails at once."""
    order = sorted(range(len(texts)), key=lambda row: (-len(texts[row]), row))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _per_token(totals: Sequence[float] | None, texts: Sequence[Sequence[int]]) -> float | None:
    return None if totals is None else sum(totals) / max(sum(map(len, texts)), 1)
