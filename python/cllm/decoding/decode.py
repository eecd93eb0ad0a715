"""`jacobi_decode`: Jacobi iteration behind HuggingFace's own extension point for decoding loops."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ..adapter import Gate, resolve_adapter
from ..adapter.peft_model import adapters_off
from ..fill import Fill, fill_table
from ..uncompiled import uncompiled
from .auto import choose
from .automatic import plan_call
from .cache import VIEW_STEP, round_up
from .candidates import CandidateIteration
from .checks import check_adapter_settings, check_inputs, check_options
from .config import AUTO, Accept, BlockSize, Compile, Guesses, JacobiConfig, Mode
from .forward import BlockForward
from .gated import GatedCandidateIteration, GatedIteration
from .graphs import GraphedForward, check_device, graphed_forward, window_key
from .inductor import CompiledForward, check_compilable
from .layouts import Layout, check_gateable, choose_layout
from .lookup import Lookup
from .loop import DecodingLoop, WindowIteration, WindowState
from .odds import GuessOdds
from .output import JacobiOutput, output_of
from .pool import GuessPool
from .positions import check_ended, check_room, limit_rows, position_limit
from .predict import Predictor, fused_head, only_temperature
from .sampling import SamplingNoise, drawn_seed, noise_rows
from .shelf import with_room
from .static_loop import graphed_loop, iteration_key
from .stopping import StopRules
from .support import ModelTraits, UnsupportedOptionError, check_model


@torch.no_grad()
def jacobi_decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    config: JacobiConfig | None = None,
    block_size: BlockSize | None = None,
    mode: Mode | None = None,
    fill: Fill | None = None,
    seed: int | None = None,
    max_iterations: int | None = None,
    accept: Accept | None = None,
    record_trajectories: bool | None = None,
    verify_size: int | None = None,
    lookup: int | None = None,
    lookup_least: int | None = None,
    pool: bool | None = None,
    guesses: Guesses | None = None,
    candidates: int | None = None,
    compile: Compile | None = None,
    adapter: Any = None,
    generator: torch.Generator | None = None,
    row_ids: Sequence[int] | torch.Tensor | None = None,
    token_streamer: Any = None,
    **model_kwargs: Any,
) -> torch.Tensor | JacobiOutput:
    """Greedy decoding, or exact sampling, n tokens per forward pass (CLLM, arXiv 2403.00835,
    section 3.1).

    Meant for ``model.generate(**inputs, custom_generate=cllm.jacobi_decode, block_size=16)``, which
    prepares the arguments. transformers keeps ``streamer`` and ``tokenizer`` to itself there: pass
    a streamer as ``token_streamer``, and for stop strings use `cllm.generate`.

    Args:
        model: a decoder-only transformers model in eval mode.
        input_ids: [B, P] int64, left-padded.
        logits_processor, stopping_criteria, generation_config: as prepared by ``generate``.
        config: settings; the keyword arguments named like its fields replace them one by one.
        adapter: makes the guesses, and decides nothing: the text is that of the base model (in
            large batches nobody asks it, see `JacobiConfig.asks_adapter`). A
            `cllm.GatedAdapter`, its folder or hub id, or a PEFT model around the same base (whose
            adapters are off in every row but the guess rows).
        generator: with ``do_sample=True`` and no `seed`: what the seed is drawn from.
        row_ids: [B] the id of each row's samples, below 2^32; None: its place in the batch. A
            prompt with the same seed and id has the same text alone and in any batch.
        token_streamer: a transformers streamer; receives accepted tokens only.
        model_kwargs: ``attention_mask`` [B, P] of zeros followed by ones, and what ``generate``
            adds of its own.

    Returns:
        [B, P + T] int64, or `JacobiOutput` with ``return_dict_in_generate=True``.

    Raises:
        UnsupportedModelError: the architecture cannot be decoded this way.
        UnsupportedOptionError: beams and other modes that Jacobi decoding has not.
        ValueError: a bad prompt, mask or setting; the message names it. So is `AdapterError`, an
            adapter that does not belong to this model.
    """
    settings = (config or JacobiConfig()).updated(
        block_size=block_size,
        mode=mode,
        fill=fill,
        seed=seed,
        max_iterations=max_iterations,
        accept=accept,
        record_trajectories=record_trajectories,
        verify_size=verify_size,
        lookup=lookup,
        lookup_least=lookup_least,
        pool=pool,
        guesses=guesses,
        candidates=candidates,
        compile=compile,
    )
    check_adapter_settings(settings, adapter)
    device, batch = input_ids.device.type, max(1, input_ids.shape[0])
    asked = adapter is not None and settings.asks_adapter(device, batch)
    if generation_config is None:
        raise ValueError(
            "jacobi_decode was called without a generation_config; call "
            "model.generate(..., custom_generate=cllm.jacobi_decode) or cllm.generate(model, ...)"
        )
    check_options(generation_config, model_kwargs)
    traits = check_model(model)
    settings = settings.on(
        device, batch, gated=asked, dtype=getattr(model, "dtype", None), context=traits.context
    )
    check_inputs(model, traits, input_ids, model_kwargs.get("attention_mask"), settings)
    if settings.compile == "graph":
        check_device(input_ids.device)
    if settings.compile == "inductor":
        check_compilable(model)
    if token_streamer is not None and input_ids.shape[0] > 1:
        raise UnsupportedOptionError(
            f"a streamer for {input_ids.shape[0]} rows",
            "it takes a batch of 1; generate the rows one by one or drop the streamer",
        )
    input_ids = input_ids.long()

    rules = StopRules.from_criteria(stopping_criteria or StoppingCriteriaList())
    if rules.max_length is None:
        raise ValueError("no length limit was given: pass max_new_tokens or max_length")
    pad = generation_config._pad_token_tensor
    pad_token_id = int(pad) if pad is not None else (rules.stop_ids or [0])[0]
    prompts, lengths = right_pad(input_ids, model_kwargs.get("attention_mask"))
    new_tokens = max(0, rules.max_length - input_ids.shape[1])
    check_room(traits, lengths, new_tokens, rules, settings)
    highest = position_limit(traits, lengths, new_tokens)
    noise = None
    if generation_config.do_sample:
        seed = drawn_seed(generator) if settings.seed is None else settings.seed
        rows = noise_rows(row_ids, input_ids.shape[0], input_ids.device)
        noise = SamplingNoise(seed, rows, input_ids.shape[1] - lengths)
    elif generator is not None or row_ids is not None:
        name = "row_ids" if generator is None else "generator"
        raise ValueError(f"{name} is about sampling; pass do_sample=True or leave it out")

    choice = None
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        probed = prompts[0, : int(lengths[0])]
        if adapter is not None:
            adapter = resolve_adapter(adapter)
            adapter.check(model)
            check_gateable(model, traits)
            stack.enter_context(adapters_off(model))
        if settings.block_size == AUTO:
            choice = choose(
                model,
                settings,
                adapter,
                prompt=probed.tolist(),
                batch=input_ids.shape[0],
                new_tokens=max(1, new_tokens),
                sampled=noise is not None,
                context=traits.context,
            )
            settings = choice.settings
        gate = None
        if asked and (choice is None or choice.gated):
            gate = stack.enter_context(adapter.applied(model))
        most = input_ids.shape[0] * _window_rows(settings, gate)
        chains = gate is not None or _several(settings)
        compiled = settings.compile == "inductor"
        layout = choose_layout(model, traits, probed, most, gated=chains, compiled=compiled)
        stack.enter_context(layout.applied(model))
        loop, prefill_seconds = _start(
            model,
            traits,
            settings,
            rules,
            input_ids=input_ids,
            prompts=prompts,
            lengths=lengths,
            highest=highest,
            pad_token_id=pad_token_id,
            layout=layout,
            processors=logits_processor or [],
            noise=noise,
            streamer=token_streamer,
            gate=gate,
            adapter=adapter,
            known_odds=None if choice is None else choice.odds,
            stack=stack,
        )
        loop.run()
        check_ended(traits, loop)
        if choice is not None:
            choice.observe(loop.runs, loop.iteration.odds)
    return output_of(
        loop,
        prompts,
        lengths,
        pad_token_id,
        prefill_seconds,
        generation_config.return_dict_in_generate,
    )


def _start(
    model: Any,
    traits: ModelTraits,
    settings: JacobiConfig,
    rules: StopRules,
    *,
    input_ids: torch.Tensor,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    highest: int | None,
    pad_token_id: int,
    layout: Layout,
    processors: Any,
    noise: SamplingNoise | None,
    streamer: Any,
    gate: Gate | None,
    adapter: Any,
    known_odds: torch.Tensor | None,
    stack: ExitStack,
) -> tuple[DecodingLoop, float]:
    batch, width = input_ids.shape
    longest = int(lengths.max())
    limit = max(rules.max_length or 0, width)
    sequences = input_ids.new_full((batch, limit), pad_token_id)
    sequences[:, :width] = input_ids
    fill = fill_table(
        settings.fill,
        prompts=prompts,
        prompt_lengths=lengths,
        prompt_width=width,
        width=limit + settings.width,
        seed=settings.seed or 0,
        vocab_size=traits.vocab_size,
        pad_token_id=pad_token_id,
    )
    head = None
    compiled = settings.compile == "inductor"
    # whether an adapter is asked may hang on the batch, a sample may not
    if noise is not None and not compiled and adapter is None and only_temperature(processors):
        head = fused_head(model)
    shape: dict[str, Any] = dict(
        batch=batch,
        slots=longest + limit - width + _window_rows(settings, gate),
        device=input_ids.device,
        position_limit=highest,
        layout=layout,
        head=head,
    )
    state = WindowState.start(
        prompts, lengths, sequences, width, fill, rules.stop_ids, settings.width
    )
    limit_rows(traits, state)
    gated = gate is not None
    lookup = pool = odds = None
    if settings.longest_lookup and settings.width > 1:
        lookup = Lookup(settings.longest_lookup, settings.least_lookup(gated), width - lengths)
    if settings.pools(gated) and settings.width > 1:
        pool = GuessPool(prompts, lengths, traits.vocab_size)
    if settings.weighs(gated) and not (lookup is None and pool is None):
        longest_end = 0 if lookup is None else lookup.longest
        odds = GuessOdds(
            batch,
            settings.width,
            longest_end,
            gated=gated,
            device=input_ids.device,
            known=known_odds,
        )
    kind, others = _iteration_kind(settings, gate)
    owner = adapter if gated else None
    verify = (settings.verify_size or settings.width) if gated else None
    if processors or noise is not None or settings.record_trajectories:
        # the host takes part in an iteration, so a forward is all that is captured
        captured = "window", _fed(settings, gate)
    else:
        captured = (
            "iteration",
            iteration_key(
                kind,
                state,
                settings,
                verify=verify,
                lookup=lookup,
                pooled=pool is not None,
                weighed=odds is not None,
            ),
        )
    plan = plan_call(
        model,
        settings.compile,
        captured=captured,
        recorded=settings.record_trajectories,
        adapter=owner,
        **shape,
    )
    forward: BlockForward
    if compiled:
        forward = CompiledForward(model, traits, **shape)
    elif plan.captured:
        forward = stack.enter_context(
            graphed_forward(
                model,
                traits,
                **shape,
                adapter=owner,
                automatic=plan.automatic,
                call_key=plan.key,
                nbytes=plan.nbytes,
            )
        )
    else:
        if plan.fixed:
            shape["slots"] = round_up(shape["slots"], VIEW_STEP)
        forward = BlockForward(model, traits, **shape, fixed=plan.fixed)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    started = time.perf_counter()
    if longest > 1:
        with_room(model, lambda: forward.prefill(prompts[:, : longest - 1], lengths - 1))
    seconds = time.perf_counter() - started
    predictor = Predictor(processors, noise, forward.head, ends=rules.stop_ids)
    sources: dict[str, Any] = dict(lookup=lookup, pool=pool, odds=odds, predictor=predictor)
    iteration = kind(forward, state, settings, **sources, **others)
    told: dict[str, Any] = dict(prompt_width=width, streamer=streamer)
    if isinstance(forward, GraphedForward):
        return graphed_loop(forward, iteration, rules, **told), seconds
    return DecodingLoop(iteration, rules, **told), seconds


def _window_rows(settings: JacobiConfig, gate: Gate | None) -> int:
    """Rows of a forward over one window, or all candidates; with an adapter they stand twice."""
    count = settings.candidates if _several(settings) else 1
    if gate is None:
        return settings.width * count
    return (settings.width + (settings.verify_size or settings.width)) * count


def _iteration_kind(
    settings: JacobiConfig, gate: Gate | None
) -> tuple[type[WindowIteration], dict[str, Any]]:
    """What runs, and its arguments beside those of every iteration."""
    kinds: dict[tuple[bool, bool], type[WindowIteration]] = {
        (False, False): WindowIteration,
        (True, False): GatedIteration,
        (False, True): CandidateIteration,
        (True, True): GatedCandidateIteration,
    }
    gated, several = gate is not None, _several(settings)
    others = {"gate": gate} if gated else {}
    return kinds[gated, several], others | ({"candidates": settings.candidates} if several else {})


def _fed(settings: JacobiConfig, gate: Gate | None) -> tuple[int | None, ...]:
    """The `window_key` of a call's forwards."""
    if not _several(settings):
        verify = None if gate is None else settings.verify_size or settings.width
        return window_key(verify, settings.width)
    count = settings.candidates
    if gate is None:
        return window_key(None, count, settings.width)
    return window_key(count, 2 * count, settings.width)


def _several(settings: JacobiConfig) -> bool:
    """Whether a forward checks several candidates; where nothing is guessed there is one."""
    return settings.candidates > 1 and settings.width > 1


def right_pad(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts [B, P] to right-padded ones and their lengths [B]."""
    batch, width = input_ids.shape
    if attention_mask is None:
        return input_ids, torch.full((batch,), width, device=input_ids.device)
    lengths = attention_mask.long().sum(dim=1)
    columns = torch.arange(width, device=input_ids.device) + (width - lengths)[:, None]
    return input_ids.gather(1, columns.clamp(max=width - 1)), lengths
