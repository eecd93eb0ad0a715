"""What is refused before the first forward: options of `generate`, prompts, settings."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers.generation import utils as huggingface
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from ..traits import CACHE_ARGUMENTS
from .config import AUTO, JacobiConfig
from .support import ModelTraits, UnsupportedOptionError, model_device

# What `generate` prepares for its own loops and this one derives anew, per row.
_PREPARED = frozenset(
    {
        "attention_mask",
        "position_ids",
        "cache_position",
        *CACHE_ARGUMENTS,
        "use_cache",
        "logits_to_keep",
        "return_dict",
    }
)


def check_adapter_settings(settings: JacobiConfig, adapter: Any) -> None:
    """Raises ValueError if there is no adapter that `verify_size` could be about, or one that
    ``compile="inductor"`` knows nothing of."""
    if adapter is not None and settings.compile == "inductor":
        raise ValueError(
            "compile='inductor' does not know the rows that an adapter guesses in; leave compile "
            "or the adapter out"
        )
    if adapter is None and settings.verify_size is not None:
        raise ValueError(
            f"verify_size={settings.verify_size} is about decoding with an adapter; "
            "pass adapter=... or leave it None"
        )


_SUPPORTED_CACHES = (None, "dynamic", "dynamic_full", "static", "hybrid", "sliding_window")


def check_options(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Refuse what Jacobi decoding does not do.

    Raises:
        UnsupportedOptionError: naming the option.
    """
    wanted = generation_config
    if wanted.num_beams is not None and wanted.num_beams > 1:
        raise UnsupportedOptionError(
            f"num_beams={wanted.num_beams}", "it keeps one hypothesis; set num_beams=1"
        )
    generation_mode = wanted.get_generation_mode()
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedOptionError(
            f"the generation mode {generation_mode.value}", "it does greedy search and sampling"
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(wanted, name, None) and wanted.return_dict_in_generate:
            raise UnsupportedOptionError(f"{name}=True", "it keeps no tensors per token")
    guidance = getattr(wanted, "guidance_scale", None)
    if guidance is not None and guidance != 1:
        raise UnsupportedOptionError(
            f"guidance_scale={guidance}", "guidance runs a second model state per token"
        )
    if getattr(wanted, "watermarking_config", None) is not None:
        raise UnsupportedOptionError("watermarking_config", "watermarking keeps state per token")
    cache = getattr(wanted, "cache_implementation", None)
    if cache not in _SUPPORTED_CACHES:
        raise UnsupportedOptionError(
            f"cache_implementation={cache!r}", "it keeps keys and values in a cache of its own"
        )
    for name in CACHE_ARGUMENTS:
        past = model_kwargs.get(name)
        if past is not None and past.get_seq_length() > 0:
            raise UnsupportedOptionError(
                name, "it cannot continue another cache; pass the whole text as input_ids"
            )
    for name, value in model_kwargs.items():
        if value is not None and name not in _PREPARED:
            raise UnsupportedOptionError(
                name, "it feeds token ids only and would leave this input out"
            )


def check_surroundings(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what transformers and PEFT would not tell a decoding loop of one's own.

    Args:
        args, kwargs: of ``generate``.

    Raises:
        UnsupportedOptionError: naming the option.
    """
    synced = kwargs.get("synced_gpus")
    if synced is None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # as transformers itself decides
        synced = several and (
            huggingface.is_deepspeed_zero3_enabled() or huggingface.is_fsdp_managed_module(model)
        )
    if synced:
        raise UnsupportedOptionError("synced_gpus=True", "rows of other ranks are not waited for")
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    wanted = kwargs.get("token_healing")
    for config in (given, getattr(model, "generation_config", None)):
        wanted = getattr(config, "token_healing", None) if wanted is None else wanted
    if wanted:
        raise UnsupportedOptionError("token_healing=True", "the tokenizer stays outside of it")
    if kwargs.get("adapter_names") is not None:
        raise UnsupportedOptionError("adapter_names", "its probe would be of other rows")
    for owner in (model, getattr(model, "base_model", None)):
        configs = getattr(owner, "peft_config", None) or {}
        if any(getattr(one, "alora_invocation_tokens", None) for one in configs.values()):
            raise UnsupportedOptionError(
                "an activated LoRA (alora_invocation_tokens)",
                "it counts tokens from a prompt's end",
            )


def check_inputs(
    model: Any,
    traits: ModelTraits,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: JacobiConfig,
) -> None:
    """Refuse prompts that cannot be decoded, before the first forward.

    Raises:
        UnsupportedOptionError: HuggingFace's own loop would take it.
        ValueError: naming the argument and what to do.
    """
    if model.training:
        raise UnsupportedOptionError(
            "a model in training mode",
            "dropout makes every forward different; call model.eval() first",
        )
    if model.dtype == torch.float64:
        raise UnsupportedOptionError(
            "dtype=torch.float64", "it takes float32, bfloat16 and float16; call model.float()"
        )
    if input_ids.dim() != 2 or input_ids.shape[0] == 0:
        raise ValueError(f"input_ids must be [batch, tokens], not {list(input_ids.shape)}")
    device = model_device(model)
    # accelerate's hook, without which there are no weights at all
    if device.type == "meta" and hasattr(model.get_input_embeddings(), "_hf_hook"):
        raise UnsupportedOptionError(
            "an offloaded input embedding",
            "its weights are in memory during a forward only; keep the embedding on a device",
        )
    if input_ids.device != device:
        raise UnsupportedOptionError(
            f"input_ids on {input_ids.device}",
            f"the model is on {device}; pass input_ids.to({str(device)!r})",
        )
    width = input_ids.shape[1]
    if width == 0:
        raise ValueError("the prompt is empty: input_ids has no tokens; pass at least one")
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= traits.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"input_ids holds the token id {wrong}, outside the model's vocabulary of "
            f"{traits.vocab_size}; was it made by another tokenizer?"
        )
    longest = width
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, input_ids "
                f"{list(input_ids.shape)}; they must be alike"
            )
        if attention_mask.device != device:
            raise ValueError(
                f"attention_mask is on {attention_mask.device}, the model on {device}; "
                f"pass attention_mask.to({str(device)!r})"
            )
        mask = attention_mask.long()
        if bool(((mask != 0) & (mask != 1)).any()) or bool((mask.diff(dim=1) < 0).any()):
            raise UnsupportedOptionError(
                "this attention_mask",
                "it must be zeros followed by ones in every row (left padding); "
                "set tokenizer.padding_side='left', and pass a mask of ones for a prompt that "
                "holds the pad token itself",
            )
        counts = mask.sum(dim=1)
        if int(counts.min()) == 0:
            row = int(counts.argmin())
            raise ValueError(f"the prompt of row {row} is empty: its attention_mask is all zeros")
        longest = int(counts.max())
    if traits.context is not None:
        if longest > traits.context:
            raise UnsupportedOptionError(
                f"a prompt of {longest} tokens",
                f"it has more than the model's context of {traits.context}; shorten it",
            )
        if settings.block_size != AUTO and settings.width > traits.context:
            raise ValueError(
                f"block_size={settings.block_size} exceeds the model's context of "
                f"{traits.context}; choose a smaller one"
            )
