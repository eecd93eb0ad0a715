"""The options that subcommands share."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Mode(StrEnum):
    sliding = "sliding"
    block = "block"


class Guesses(StrEnum):
    adaptive = "adaptive"
    ordered = "ordered"


class Compile(StrEnum):
    graph = "graph"
    inductor = "inductor"
    off = "off"


class Fill(StrEnum):
    prompt = "prompt"
    last = "last"
    random = "random"
    pad = "pad"


def _set_debug(value: bool) -> bool:
    if value:
        os.environ["CLLM_DEBUG"] = "1"
    return value


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="Model folder or hub id.  [default: SmolLM2-135M-Instruct, of 4-bit weights]",
        show_default=False,
    ),
]
# of the prompts that ship with the package, where none are given
SHIPPED_PROMPTS = 4
PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A prompt of your own; may be given several times."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE.jsonl", help='One {"prompt": "..."} a line.'),
]
PromptLimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        help=f"Use the first N prompts.  [default: {SHIPPED_PROMPTS} of the 40 that ship with "
        "the package, all of your own]",
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate for a prompt.")
]
BlockSizeOption = Annotated[
    int, typer.Option("--block-size", min=1, help="n: tokens guessed and checked in one forward.")
]


def _block_size(given: str | int) -> int | str:
    text = str(given)  # the default comes as it is
    if text == "auto" or (text.isdecimal() and int(text) >= 1):
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f"{text!r} is neither an integer >= 1 nor auto")


AutoBlockSizeOption = Annotated[
    Any,
    typer.Option(
        "--block-size",
        parser=_block_size,
        metavar="N|auto",
        help="n: tokens guessed and checked in one forward; auto: what should be fastest here.  "
        "[default: 16 on a GPU, 6 or (where rows cost more) 4 on a CPU, fewer in batches]",
    ),
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Precision of the weights and activations.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto (CUDA where there is one), cpu, cuda, cuda:N.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="PATH_OR_HUB_ID",
        help="Gated adapter: makes the guesses, and the text stays the model's own.",
        show_default=False,
    ),
]
ShippedAdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="PATH_OR_HUB_ID",
        help="Gated adapter: makes the guesses, and the text stays the model's own.  [default: "
        "the one that ships with the package for this model, if there is one]",
        show_default=False,
    ),
]
VerifySizeOption = Annotated[
    int | None,
    typer.Option(
        "--verify-size",
        min=1,
        help="With --adapter: tokens of the window that the model checks.  [default: all]",
        show_default=False,
    ),
]
LookupOption = Annotated[
    int | None,
    typer.Option(
        "--lookup",
        min=0,
        help="Most tokens of the text's end that are looked up in it for guesses; 0: none.  "
        "[default: 8; 0 with --mode block]",
        show_default=False,
    ),
]
PoolOption = Annotated[
    bool | None,
    typer.Option(
        "--pool/--no-pool",
        help="Guess from earlier predictions, too.  [default: where "
        "something is looked up, with an adapter only for several candidates]",
        show_default=False,
    ),
]
GuessesOption = Annotated[
    Guesses,
    typer.Option(
        "--guesses",
        help="adaptive: from the source that was right most often so far; ordered: from the text, "
        "else the pool, else left-over predictions.",
    ),
]
CandidatesOption = Annotated[
    int,
    typer.Option(
        "--candidates",
        min=1,
        help="Windows of guesses, up to 32, that a forward checks side by side, for devices on "
        "which rows cost little.",
    ),
]
CompileOption = Annotated[
    Compile | None,
    typer.Option(
        "--compile",
        help="graph: CUDA graphs of whole iterations; inductor: torch.compile, on a CPU.  "
        "[default: graph on a GPU, from the second call of a shape on; else off]",
        show_default=False,
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random guesses.")]
_SAMPLING = "Sampling (any of these instead of the most likely token)"
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", help="Above 0.  [default: 1]", rich_help_panel=_SAMPLING),
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", min=1, help="Of the K most likely.", rich_help_panel=_SAMPLING),
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", help="Of the most likely, P in all.", rich_help_panel=_SAMPLING),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p", help="Of those with P times the best one's.", rich_help_panel=_SAMPLING
    ),
]
ModeOption = Annotated[
    Mode, typer.Option("--mode", help="sliding window, or the paper's block by block.")
]
FillOption = Annotated[
    Fill, typer.Option("--fill", help="Where a guess comes from when nothing better is known.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads for torch.  [default: torch's choice]"),
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", callback=_set_debug, help="Show tracebacks of errors."),
]
