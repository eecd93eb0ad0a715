"""Decoder layers over a block's few rows, beside the modules of HuggingFace, over weights that no
cache holds: on a CPU those of a small model, all in one native call; on a GPU those of LLaMA-2-7B
too.

    python benchmarks/kernels/decoder_layer.py --device cpu --record
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import cllm_kernels
from benchmarks.kernels.cases import (
    Case,
    Inputs,
    Run,
    Variant,
    compiled,
    itemsize,
    own_variants,
    short,
)
from benchmarks.kernels.harness import main
from cllm.decoding.graphs import capture
from cllm.traits import cache_argument
from cllm_kernels import DecoderStack, DecoderWeights
from cllm_kernels.decoder_layer import OP
from cllm_kernels.decoder_layer.reference import layer
from cllm_kernels.decoder_layer.weights import LINEARS

# hidden size, MLP size, query heads, key heads, head size, layers: those of SmolLM2-135M
SMOLLM2 = (576, 1536, 9, 3, 64, 30)
SMALL = (48, 64, 4, 2, 16, 2)
CONTEXT = 256
# four of LLaMA-2-7B's 32 layers hold 1.6 GB in bf16
LLAMA = (4096, 11008, 32, 32, 128, 4)
CPU = [
    *[(SMOLLM2, rows, CONTEXT) for rows in (1, 4, 8, 16, 32)],
    (SMOLLM2, 4, 2048),
]
GPU = [
    *[(LLAMA, rows, CONTEXT) for rows in (1, 16, 64)],
    (SMOLLM2, 1, CONTEXT),
    (SMOLLM2, 8, CONTEXT),
]
QUICK = [(SMALL, 5, 20)]
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5
# relative, in the 2-norm, behind all layers: in bf16 ten roundings of 2^-9 in each of thirty layers
# come to some sqrt(300) * 2^-9 = 0.034
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-4}
Model = tuple[int, int, int, int, int, int]


def shapes_of(model: Model) -> list[tuple[int, int]]:
    hidden, inner, heads, kv_heads, size, _ = model
    queries, keys = heads * size, kv_heads * size
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]


def case(model: Model, rows: int, context: int, dtype: torch.dtype, device: torch.device) -> Case:
    hidden, inner, heads, kv_heads, size, layers = model
    shapes = shapes_of(model)

    def inputs(device: torch.device) -> Inputs:
        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        def weights() -> DecoderWeights:
            linears: dict[str, Any] = {
                name: random(*shape, scale=shape[1] ** -0.5)
                for name, shape in zip(LINEARS, shapes, strict=True)
            }
            ones = torch.ones(hidden, device=device, dtype=dtype)
            return DecoderWeights(**linears, attention_norm=ones, mlp_norm=ones, head_size=size)

        positions = torch.arange(context, context + rows, device=device)
        turns = positions[:, None] * 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
        angles = torch.cat([turns, turns], dim=-1)[None]
        caches = [[random(1, kv_heads, context + rows, size) for _ in range(layers)] for _ in "kv"]
        return {
            "hidden": random(1, rows, hidden),
            "weights": [weights() for _ in range(layers)],
            "cos": angles.cos().to(dtype),
            "sin": angles.sin().to(dtype),
            "keys": caches[0],
            "values": caches[1],
            "lengths": torch.tensor([context], device=device),
        }

    def ours(inputs: Inputs) -> Run:
        """As decoding has them: all layers in one call on a CPU, on a GPU one by one."""
        stack = DecoderStack(inputs["weights"], inputs["keys"], inputs["values"], eps=EPS)
        rest = inputs["cos"], inputs["sin"], inputs["lengths"]
        return Run(lambda: cllm_kernels.decoder_layers(inputs["hidden"], stack, *rest))

    def compiled_reference(inputs: Inputs) -> Run:
        """One graph, that of a layer, for all of them."""
        one = compiled(layer)
        layered = list(zip(inputs["weights"], inputs["keys"], inputs["values"], strict=True))
        cos, sin, lengths = inputs["cos"], inputs["sin"], inputs["lengths"]

        def call() -> Tensor:
            x = inputs["hidden"]
            for weights, *caches in layered:
                x = one(
                    x, weights, cos, sin, *caches, lengths, size**-0.5, EPS, None, rows, None, rows
                )
            return x

        return Run(call)

    def products(inputs: Inputs) -> Run:
        """The linear layers, on whatever is there."""
        narrow = inputs["hidden"]
        wide = torch.ones(1, rows, inner, dtype=dtype, device=device)
        mixed = torch.ones(1, rows, heads * size, dtype=dtype, device=device)
        given = [narrow, narrow, narrow, mixed, narrow, narrow, wide]

        def call() -> None:
            for weights in inputs["weights"]:
                for x, weight in zip(given, weights.linears, strict=True):
                    cllm_kernels.block_linear(x, weight)

        return Run(call)

    def theirs(inputs: Inputs) -> Run:
        return huggingface(inputs, model)

    numbers = sum(out * width for out, width in shapes) * layers
    seen = rows * context + rows * (rows + 1) // 2
    flop = 2 * rows * numbers + 4 * heads * size * seen * layers
    cached = 2 * kv_heads * size * (context + 2 * rows) * layers
    moved = (numbers + cached + 2 * rows * hidden) * itemsize(dtype)
    return Case(
        name=f"{short(dtype)} n={rows} context={context} x {layers} layers",
        dtype=dtype,
        shape={"n": rows, "context": context, "layers": layers, "H": hidden, "I": inner},
        make_inputs=inputs,
        variants=[
            Variant("HuggingFace layers", "baseline", theirs, flop, moved),
            Variant("compiled reference", "baseline", compiled_reference, flop, moved),
            *own_variants(OP, device, ours, flop, moved),
            Variant("block_linear alone", "matmuls", products, flop, moved, compared=False),
            *(in_graphs(theirs, ours, products, flop, moved) if device.type == "cuda" else ()),
        ],
        flop_floor=flop,
        bytes_floor=moved,
        tolerance=TOLERANCE[dtype],
    )


def in_graphs(
    theirs: Callable[[Inputs], Run],
    ours: Callable[[Inputs], Run],
    products: Callable[[Inputs], Run],
    flop: float,
    moved: float,
) -> list[Variant]:
    """The same as CUDA graphs, in which nobody waits for Python."""

    def graphed(build: Callable[[Inputs], Run]) -> Callable[[Inputs], Run]:
        return lambda inputs: captured(build(inputs))

    return [
        Variant("HuggingFace layers, in a graph", "baseline", graphed(theirs), flop, moved),
        Variant("cllm auto, in a graph", "cllm", graphed(ours), flop, moved),
        Variant(
            "block_linear alone, in a graph", "matmuls", graphed(products), flop, moved,
            compared=False,
        ),
    ]  # fmt: skip


def captured(run: Run) -> Run:
    """A call as a CUDA graph. It always starts from the state that it was captured in."""

    def call() -> Tensor:
        if run.prepare is not None:
            run.prepare()
        return run.call()

    result, replay = capture(call)
    # a graph reads memory that it does not own: what was made for `run` stays as long as this does
    return Run(lambda: (replay(), result, call)[1])


def huggingface(inputs: Inputs, model: Model) -> Run:
    """transformers' modules with its own cache, which is cut back before every call."""
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    hidden, inner, heads, kv_heads, size, layers = model
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=size, num_hidden_layers=layers, rms_norm_eps=EPS,
        attn_implementation="sdpa",
    )  # fmt: skip
    first = inputs["hidden"]
    rows, context = first.shape[1], int(inputs["lengths"][0])
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    modules = []
    for index, weights in enumerate(inputs["weights"]):
        module = LlamaDecoderLayer(config, index).to(first.device, first.dtype).eval()
        for name, weight in zip(names, weights.linears, strict=True):
            module.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
        modules.append(module)
    cache = DynamicCache(config=config)
    for index, pair in enumerate(zip(inputs["keys"], inputs["values"], strict=True)):
        cache.update(*(part[:, :, :context] for part in pair), index)
    places = torch.arange(context + rows, device=first.device)
    mask = (places <= context + torch.arange(rows, device=first.device)[:, None])[None, None]
    name = cache_argument(inspect.signature(modules[0].forward).parameters)
    given = {name: cache, "position_embeddings": (inputs["cos"], inputs["sin"])}

    # what a captured call has read must not be freed when the cache takes its result
    kept: list[Any] = []

    def call() -> Tensor:
        x = first
        kept[:] = [(layer.keys, layer.values) for layer in cache.layers]
        for module in modules:
            x = module(x, attention_mask=mask, use_cache=True, **given)
        return x

    def cut_back() -> None:
        if beyond := cache.get_seq_length() - context:
            cache.crop(-beyond)

    return Run(call, prepare=cut_back)


def cases(device: torch.device, quick: bool) -> list[Case]:
    sizes = QUICK if quick else CPU if device.type == "cpu" else GPU
    # on a GPU nobody decodes in fp32
    dtypes = DTYPES if device.type == "cpu" else (torch.bfloat16,)
    return [case(*size, dtype, device) for dtype in dtypes for size in sizes]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    return main("decoder_layer", cases, __file__, __doc__, argv)


if __name__ == "__main__":
    run()
