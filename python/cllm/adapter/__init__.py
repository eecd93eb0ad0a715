"""Low-rank weights that guess, and never decide: the gated consistency adapter.

A CLLM (arXiv 2403.00835) is a fine-tuned model, so its text is no longer the base model's. Here the
trained weights are added where a guess is made and nowhere else. In each forward the window stands
twice: *verify rows* run the base weights and alone decide what is committed, *guess rows* carry the
same tokens, run base + LoRA, and propose the next window. Whatever the adapter holds, the text is
the base model's.
"""

from .catalogue import ShippedAdapter, shipped_adapter, shipped_adapters
from .errors import AdapterError
from .fingerprint import base_fingerprint
from .gate import Gate
from .gated import GatedAdapter, resolve_adapter
from .weights import LowRank

__all__ = [
    "AdapterError",
    "Gate",
    "GatedAdapter",
    "LowRank",
    "ShippedAdapter",
    "base_fingerprint",
    "resolve_adapter",
    "shipped_adapter",
    "shipped_adapters",
]
