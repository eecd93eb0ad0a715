"""Who takes part in a comparison: every way to decode a model that a user could pick instead.

A contender is made inside its own process, decodes batches of prompts, and says how many forwards
of the model it took, each of them counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter import GatedAdapter
from ..decoding import JacobiConfig, JacobiOutput, generate
from ..decoding.support import check_model
from ..responders import end_tokens, left_padded, up_to_end


@dataclass(frozen=True)
class Setup:
    """What a contender is made of.

    Attributes:
        model: folder or hub id.
        dtype, device: names.
        adapter: of the gated contenders, or None.
        draft: folder or hub id of a smaller model with the same tokenizer, or None.
        cllm_weights: folder or hub id of a consistency LLM of the same base, or None.
        block_size: n where it is not chosen automatically; None: the default of each contender.
        longest: most tokens of a prompt and its text, for caches of fixed size.
    """

    model: str
    dtype: str
    device: str
    adapter: str | None
    draft: str | None
    cllm_weights: str | None
    block_size: int | None
    longest: int


@dataclass(frozen=True)
class Decoded:
    """A batch that was decoded.

    Attributes:
        texts: new token ids of every row, up to and including its end.
        forwards: of the model, the prefill among them.
        first_token: seconds until the first token was there, batch 1 only, else None.
        seconds: of the whole call.
    """

    texts: list[list[int]]
    forwards: int
    first_token: float | None
    seconds: float


# prompts and the most new tokens
Decode = Callable[[list[list[int]], int], Decoded]


class Absent(Exception):
    """A contender that cannot take part, and why."""


class _Clock:
    """A streamer that notes when the first new token arrives."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2 and self.first is None:  # the first is the prompt
            self.first = time.perf_counter() - self.started

    def end(self) -> None:
        pass


class _Forwards:
    """Counts the forwards of a model by those of its embedding."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.get_input_embeddings().register_forward_hook(self._one)

    def _one(self, *_: Any) -> None:
        self.count += 1


def load_model(name: str, setup: Setup) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, setup.dtype))
    return model.to(setup.device).eval()


def _inputs(model: Any, prompts: list[list[int]], most: int) -> dict[str, Any]:
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else min(end_tokens(model), default=0)
    ids, mask = left_padded(prompts, pad)
    return {
        "input_ids": ids.to(model.device), "attention_mask": mask.to(model.device),
        "max_new_tokens": most, "do_sample": False, "num_beams": 1, "pad_token_id": pad,
    }  # fmt: skip


def _huggingface(model: Any, *, hooked: bool = True, **options: Any) -> Decode:
    """`generate` with options, or with what a function makes of the batch size.

    Args:
        hooked: forwards are counted; otherwise there is one for each token.
    """
    counted, ends = _Forwards(model) if hooked else None, end_tokens(model)

    def decode(prompts: list[list[int]], most: int) -> Decoded:
        inputs = _inputs(model, prompts, most)
        extra = {name: value(len(prompts)) if callable(value) else value
                 for name, value in options.items()}  # fmt: skip
        before = counted.count if counted else 0
        clock = _Clock()
        streamer = clock if len(prompts) == 1 else None
        sequences = model.generate(**inputs, streamer=streamer, **extra).cpu()
        seconds = time.perf_counter() - clock.started
        width = inputs["input_ids"].shape[1]
        texts = [up_to_end(row[width:].tolist(), ends) for row in sequences]
        forwards = counted.count - before if counted else max(map(len, texts))
        return Decoded(texts, forwards, clock.first, seconds)

    return decode


def _cllm(model: Any, config: JacobiConfig, adapter: Any = None) -> Decode:
    ends = end_tokens(model)

    def decode(prompts: list[list[int]], most: int) -> Decoded:
        inputs = _inputs(model, prompts, most)
        clock = _Clock()
        out = generate(
            model, config=config, adapter=adapter, return_dict_in_generate=True,
            streamer=clock if len(prompts) == 1 else None, **inputs,
        )  # fmt: skip
        assert isinstance(out, JacobiOutput)
        assert out.sequences is not None and out.forwards is not None
        sequences = out.sequences.cpu()
        seconds = time.perf_counter() - clock.started
        width = inputs["input_ids"].shape[1]
        texts = [up_to_end(row[width:].tolist(), ends) for row in sequences]
        return Decoded(texts, out.forwards + (width > 1), clock.first, seconds)

    return decode


def _eager(setup: Setup) -> Decode:
    return _huggingface(load_model(setup.model, setup))


def _compiled(setup: Setup) -> Decode:
    """A cache of fixed size that is used again, and `generate`'s own compilation of the decoding
    step, which it does by itself on a GPU and is asked for on a CPU."""
    from transformers import CompileConfig, StaticCache

    model = load_model(setup.model, setup)
    compile_config: Any = CompileConfig(dynamic=False)
    if setup.device == "cpu":
        compile_config = CompileConfig(mode="default", dynamic=False, fullgraph=False)
        compile_config._compile_all_devices = True
    caches: dict[int, Any] = {}

    def cache(batch: int) -> Any:
        if batch not in caches:
            caches[batch] = StaticCache(config=model.config, max_cache_len=setup.longest)
        caches[batch].reset()
        return caches[batch]

    # a hook would be compiled, and compiled again for every number that it counts to
    options = {check_model(model).cache_argument: cache, "compile_config": compile_config}
    return _huggingface(model, hooked=False, **options)


def _one_row(prompts: list[list[int]], name: str) -> None:
    if len(prompts) > 1:
        raise Absent(f"{name} takes a batch of 1")


def _prompt_lookup(setup: Setup) -> Decode:
    decode = _huggingface(load_model(setup.model, setup), prompt_lookup_num_tokens=10)

    def alone(prompts: list[list[int]], most: int) -> Decoded:
        _one_row(prompts, "assisted generation")
        return decode(prompts, most)

    return alone


def _assisted(setup: Setup) -> Decode:
    if setup.draft is None:
        raise Absent("no draft model was given (--draft)")
    draft = load_model(setup.draft, setup)
    decode = _huggingface(load_model(setup.model, setup), assistant_model=draft)

    def alone(prompts: list[list[int]], most: int) -> Decoded:
        _one_row(prompts, "assisted generation")
        return decode(prompts, most)

    return alone


def _flashspec(setup: Setup) -> Decode:
    try:
        from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
        from flashspec.engine import NgramDrafter, TargetModel
    except ImportError as error:
        raise Absent(f"flashspec is not installed ({error})") from error
    model = load_model(setup.model, setup)
    counted, ends = _Forwards(model), end_tokens(model)
    device, dtype = torch.device(setup.device), getattr(torch, setup.dtype)
    target = TargetModel(setup.model, device, dtype, model=model)
    drafters: Any = [NgramDrafter()]
    settings = FlashSpecConfig(device=setup.device, sampling=SamplingConfig(temperature=0.0))
    engine = SpeculativeEngine(settings, drafters, target)

    def decode(prompts: list[list[int]], most: int) -> Decoded:
        _one_row(prompts, "this path of flashspec")
        counted.count = 0
        started = time.perf_counter()
        ids = torch.tensor(prompts, device=setup.device)
        found = engine.generate(ids, max_new_tokens=most, eos_token_ids=sorted(ends))
        tokens = found.output_ids[0].tolist()
        seconds = time.perf_counter() - started
        if tokens[: len(prompts[0])] == prompts[0]:
            tokens = tokens[len(prompts[0]) :]
        text = up_to_end([token for token in tokens if token >= 0], ends)[:most]
        return Decoded([text], counted.count, None, seconds)

    return decode


def _config(setup: Setup, changes: dict[str, Any]) -> JacobiConfig:
    given: dict[str, Any] = {"block_size": setup.block_size} | changes
    if setup.device.startswith("cuda"):
        given["compile"] = "graph"
    return JacobiConfig(**given)


def _jacobi(**changes: Any) -> Callable[[Setup], Decode]:
    """Base weights; the block size is the setup's unless `changes` say another."""

    def make(setup: Setup) -> Decode:
        return _cllm(load_model(setup.model, setup), _config(setup, changes))

    return make


def _gated(**changes: Any) -> Callable[[Setup], Decode]:
    """The same with the adapter."""

    def make(setup: Setup) -> Decode:
        if setup.adapter is None:
            raise Absent("no adapter was given (--adapter)")
        model = load_model(setup.model, setup)
        adapter = GatedAdapter.load(setup.adapter)
        adapter.check(model)
        config = _config(setup, changes)
        decode = _cllm(model, config, adapter)

        def where_it_is_asked(prompts: list[list[int]], most: int) -> Decoded:
            if not config.asks_adapter(torch.device(setup.device).type, len(prompts)):
                raise Absent(
                    f"in batches of {len(prompts)} no adapter is asked unless a size is named "
                    "(--block-size)"
                )
            return decode(prompts, most)

        return where_it_is_asked

    return make


def _weights(**changes: Any) -> Callable[[Setup], Decode]:
    """The same with weights that were trained for it; the text is theirs."""

    def make(setup: Setup) -> Decode:
        if setup.cllm_weights is None:
            raise Absent("no CLLM weights were given (--cllm-weights)")
        return _cllm(load_model(setup.cllm_weights, setup), _config(setup, changes))

    return make


EAGER = "HuggingFace"
CONTENDERS: dict[str, Callable[[Setup], Decode]] = {
    EAGER: _eager,
    "HuggingFace, static cache, compiled": _compiled,
    "HuggingFace, prompt lookup": _prompt_lookup,
    "HuggingFace, draft model": _assisted,
    "flashspec, prompt lookup": _flashspec,
    "cllm, one token": _jacobi(block_size=1),
    "cllm, Jacobi": _jacobi(lookup=0),
    "cllm, looked up": _jacobi(pool=False),
    "cllm, looked up, pool": _jacobi(),
    "cllm, looked up, pool, tree": _jacobi(candidates=2),
    "cllm, automatic": _jacobi(block_size="auto"),
    "cllm, adapter": _gated(lookup=0),
    "cllm, adapter, looked up": _gated(),
    "cllm, adapter, tree": _gated(candidates=2),
    "cllm, adapter, automatic": _gated(block_size="auto"),
    "CLLM weights": _weights(lookup=0),
    "CLLM weights, looked up, pool": _weights(),
    "CLLM weights, looked up, pool, tree": _weights(candidates=2),
    "CLLM weights, automatic": _weights(block_size="auto"),
}
# those that time their own forwards before they decode
TUNED = {"cllm, automatic", "cllm, adapter, automatic", "CLLM weights, automatic"}
