"""Randomly initialised models of many families, small enough to decode in milliseconds."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf

VOCAB = 97
PAD, BOS, EOS = 0, 1, 2

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_BASE = dict(SIZES, max_position_embeddings=256, **_IDS)
_HEADS = dict(_BASE, head_dim=8)
_LOCAL = dict(_HEADS, sliding_window=8)
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_NO_GROUPS = {name: value for name, value in _BASE.items() if name != "num_key_value_heads"}
_FALCON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **_IDS)

CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**_HEADS),
    "qwen2": lambda: hf.Qwen2Config(**_BASE),
    "qwen2-local": lambda: hf.Qwen2Config(
        **_BASE, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**_HEADS),
    "mistral": lambda: hf.MistralConfig(**_LOCAL),
    "gemma2": lambda: hf.Gemma2Config(**_LOCAL, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**_LOCAL, query_pre_attn_scalar=8, layer_types=_MIXED),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, **_IDS
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**_NO_GROUPS),
    "phi": lambda: hf.PhiConfig(**_NO_GROUPS),
    "olmo2": lambda: hf.Olmo2Config(**_BASE),
    "mixtral": lambda: hf.MixtralConfig(**_LOCAL, num_local_experts=4),
    "starcoder2": lambda: hf.Starcoder2Config(**_BASE, sliding_window=8),
    "gpt-oss": lambda: hf.GptOssConfig(**_LOCAL, num_local_experts=4, layer_types=_MIXED),
    "deepseek-v3": lambda: hf.DeepseekV3Config(
        **dict(_BASE, num_key_value_heads=4),
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
    ),
    # asks for its attention by name, so it cannot be folded
    "falcon": lambda: hf.FalconConfig(**_FALCON, alibi=False),
    # read positions off the keys' places, so they need right-aligned rows
    "falcon-alibi": lambda: hf.FalconConfig(**_FALCON, alibi=True),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, **_IDS),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=256,
        **_IDS,
    ),
}


@cache
def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose weights are large enough that its text is not one repeated token."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.to(dtype)


def fresh_model(family: str = "llama") -> Any:
    """A copy that a test may change."""
    import copy

    return copy.deepcopy(tiny_model(family))


def prompts(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A left-padded batch of random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
