"""``cllm generate``: one prompt to text, or a file of prompts to a file of rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    CommandError,
    CommandInterrupted,
    decoding_config,
    diagnostics,
    load,
    load_adapter,
    sampling_settings,
)
from .options import (
    AdapterOption,
    AutoBlockSizeOption,
    CandidatesOption,
    Compile,
    CompileOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    Fill,
    FillOption,
    Guesses,
    GuessesOption,
    LookupOption,
    MaxNewTokensOption,
    MinPOption,
    Mode,
    ModelOption,
    ModeOption,
    PoolOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    VerifySizeOption,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..adapter import GatedAdapter
    from ..decoding import JacobiConfig
    from ..models import LoadedModel
    from ..prompts import Prompt
    from .rows import RowFile

Emit = Callable[[dict[str, Any], "dict[str, Any] | None"], None]


def generate(
    model: ModelOption = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The prompt.  [default: standard input]")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE.jsonl", help='One {"prompt": "..."} a line.'),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE.jsonl",
            help="One row a prompt; run again to continue.  [default: standard output]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop the rows that --output already holds.")
    ] = False,
    trajectories: Annotated[
        Path | None,
        typer.Option(
            "--trajectories",
            metavar="FILE.jsonl",
            help="Record every iteration, for `cllm report`; needs --output.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts that are decoded together.")
    ] = 1,
    system: Annotated[
        str | None, typer.Option("--system", help="System message of the chat template.")
    ] = None,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Feed the prompt as it stands.")
    ] = False,
    max_new_tokens: MaxNewTokensOption = 256,
    block_size: AutoBlockSizeOption = None,
    adapter: AdapterOption = None,
    verify_size: VerifySizeOption = None,
    lookup: LookupOption = None,
    pool: PoolOption = None,
    guesses: GuessesOption = Guesses.adaptive,
    candidates: CandidatesOption = 1,
    compile: CompileOption = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "auto",
    mode: ModeOption = Mode.sliding,
    fill: FillOption = Fill.prompt,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of random guesses, and of samples.")
    ] = 0,
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> int:
    """Generate text by Jacobi decoding: the tokens of greedy search, or samples."""
    from ..prompts import read_prompts

    if prompt is not None and prompts is not None:
        raise CommandError("give --prompt or --prompts, not both")
    if output is None and (overwrite or trajectories is not None):
        name = "--overwrite" if overwrite else "--trajectories"
        raise CommandError(f"{name} needs --output")
    if verify_size is not None and adapter is None:
        raise CommandError("--verify-size needs --adapter")
    if compile is Compile.inductor and adapter is not None:
        raise CommandError("--compile inductor has no adapter rows; leave it or --adapter out")
    sampling = sampling_settings(temperature, top_k, top_p, min_p)
    errors = diagnostics()
    config = decoding_config(
        block_size,
        mode,
        fill,
        seed,
        record=trajectories is not None,
        verify_size=verify_size,
        lookup=lookup,
        pool=pool,
        candidates=candidates,
        compile=compile,
        guesses=guesses,
    )
    chosen = read_prompts(prompts) if prompts is not None else [_one_prompt(prompt)]
    settings: dict[str, Any] = {
        "model": model or "default",
        "dtype": dtype.value,
        "max_new_tokens": max_new_tokens,
        "block_size": block_size,
        "mode": mode.value,
        "fill": fill.value,
        "seed": seed,
        "system": system,
        "chat_template": not no_chat_template,
    }
    if adapter is not None:
        settings |= {"adapter": adapter, "verify_size": verify_size}
    if lookup is not None:
        settings["lookup"] = lookup
    if pool is not None:
        settings["pool"] = pool
    if guesses is not Guesses.adaptive:
        settings["guesses"] = guesses.value
    if candidates > 1:
        settings["candidates"] = candidates
    if compile is Compile.inductor:  # graphs round as what they capture
        settings["compile"] = compile.value
    if sampling:
        settings["sampling"] = sampling

    def start() -> _Run:
        loaded = load(model, dtype, device, threads, errors)
        chosen_adapter = None if adapter is None else load_adapter(adapter, loaded, errors)
        run = _Run(loaded, config, max_new_tokens, sampling, errors, chosen_adapter)
        run.encode(chosen, system, not no_chat_template)
        rows = min(batch_size, len(chosen))
        if adapter is not None and not config.asks_adapter(loaded.model.device.type, rows):
            errors.print(
                f"in batches of {rows} the adapter is not asked: its rows cost more than they save "
                "(--block-size N asks it all the same)",
                markup=False,
                soft_wrap=True,
            )
        return run

    if output is not None:
        _check_files(prompts, output, trajectories)
        rows = _open_rows(output, chosen, settings, overwrite, trajectories)
        return _to_file(start, rows, output, len(chosen), batch_size, errors)
    run = start()
    if prompts is None:
        run.stream_one()
    else:
        run.rows(0, batch_size, lambda row, record: _print_row(row))
    return 0


def _one_prompt(text: str | None) -> Prompt:
    from ..prompts import Prompt

    if text is None:
        if sys.stdin.isatty():
            raise CommandError(
                "no prompt: give --prompt TEXT, --prompts FILE.jsonl, or pipe text in"
            )
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CommandError(f"standard input is not UTF-8 text ({error.reason})") from error
    if not text.strip():
        raise CommandError("the prompt is empty; give it some text")
    return Prompt("0", text)


def _check_files(prompts: Path | None, output: Path, trajectories: Path | None) -> None:
    paths = {"--prompts": prompts, "--output": output, "--trajectories": trajectories}
    named = {name: path.resolve() for name, path in paths.items() if path is not None}
    for one, other in combinations(named, 2):
        if named[one] == named[other]:
            raise CommandError(f"{one} and {other} name the same file")


def _open_rows(
    output: Path,
    prompts: list[Prompt],
    settings: dict[str, Any],
    overwrite: bool,
    trajectories: Path | None,
) -> RowFile:
    from .rows import RowFile

    return RowFile(output, prompts, settings, overwrite=overwrite, records=trajectories)


def _to_file(
    start: Callable[[], _Run],
    rows: RowFile,
    output: Path,
    total: int,
    batch_size: int,
    errors: Console,
) -> int:
    with closing(rows):
        if rows.finished == total:
            errors.print(f"all {total} rows are in {output}", markup=False, soft_wrap=True)
            return 0
        if rows.finished:
            errors.print(
                f"continuing: {rows.finished} of {total} rows are in {output}",
                markup=False,
                soft_wrap=True,
            )
        try:
            start().rows(rows.finished, batch_size, rows.append)
        except KeyboardInterrupt as error:
            raise CommandInterrupted(
                f"interrupted: {rows.count()} of {total} rows are in {output}; "
                "run the same command to continue"
            ) from error
    return 0


def _print_row(row: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    sys.stdout.flush()


class _Run:
    """A loaded model and encoded prompts."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: JacobiConfig,
        max_new_tokens: int,
        sampling: dict[str, float],
        errors: Console,
        adapter: GatedAdapter | None,
    ) -> None:
        self._loaded = loaded
        self._config = config
        self._adapter = adapter
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._errors = errors
        self._prompts: list[Prompt] = []
        self._ids: list[torch.Tensor] = []

    def encode(self, prompts: list[Prompt], system: str | None, chat_template: bool) -> None:
        """Turn all prompts into token ids, so that a bad one stops the run before it starts."""
        from ..prompts import check_length, encode

        for prompt in prompts:
            ids = encode(self._loaded.tokenizer, prompt, system=system, chat_template=chat_template)
            check_length(self._loaded.model, prompt, ids)
            self._ids.append(ids)
        self._prompts = prompts

    def stream_one(self) -> None:
        """Print the first prompt's text as it comes, and a line of figures on standard error."""
        import time

        from transformers import TextStreamer

        streamer = TextStreamer(self._loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        started = time.perf_counter()
        out = self._decode([0], streamer)
        seconds = time.perf_counter() - started
        tokens = int(out.accepted[0])
        self._errors.print(
            f"{tokens} tokens in {out.forwards} forwards "
            f"({out.tokens_per_forward:.2f} per forward), {tokens / seconds:.1f} tokens/s"
        )

    def rows(self, first: int, batch_size: int, emit: Emit) -> None:
        """Decode the prompts from `first` on, a batch at a time, and emit their rows in order."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        tokens = forwards = 0
        with Progress(*columns, console=self._errors, redirect_stdout=False) as bar:
            task = bar.add_task("", total=len(self._prompts), completed=first, rate="")
            for start in range(first, len(self._prompts), batch_size):
                members = list(range(start, min(start + batch_size, len(self._prompts))))
                out = self._decode(members)
                for place, index in enumerate(members):
                    row = self._row(index, out, place)
                    recorded = out.trajectories[place] if out.trajectories else None
                    if recorded is not None:
                        recorded.with_pieces(self._loaded.tokenizer)
                    emit(row, recorded.to_json() if recorded is not None else None)
                    tokens += row["tokens"]
                    forwards += row["iterations"]
                    bar.update(task, advance=1, rate=f"{tokens / forwards:.2f} tokens per forward")

    def _decode(self, members: list[int], streamer: Any = None) -> Any:
        """One call of `cllm.generate` over prompts `members`, padded on the left."""
        import torch

        from ..decoding import generate as jacobi_generate

        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        width = max(self._ids[index].numel() for index in members)
        input_ids = torch.full((len(members), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for place, index in enumerate(members):
            ids = self._ids[index]
            input_ids[place, width - ids.numel() :] = ids
            mask[place, width - ids.numel() :] = 1
        extra: dict[str, Any] = {"do_sample": bool(self._sampling)}
        if model.generation_config.pad_token_id is None:
            extra["pad_token_id"] = pad
        if model.generation_config.stop_strings is not None:
            extra["tokenizer"] = tokenizer
        if self._sampling:
            # top_k=0: all of them, where transformers would take 50
            extra |= {"top_k": 0, **self._sampling, "row_ids": members}
        return jacobi_generate(
            model,
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            num_beams=1,
            max_new_tokens=self._max_new_tokens,
            config=self._config,
            adapter=self._adapter,
            streamer=streamer,
            return_dict_in_generate=True,
            **extra,
        )

    def _row(self, index: int, out: Any, place: int) -> dict[str, Any]:
        tokens, iterations = int(out.accepted[place]), int(out.iterations[place])
        padded = out.sequences.shape[1] - int(out.accepted.max())
        ids = out.sequences[place, padded : padded + tokens].tolist()
        ends = self._loaded.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {
            "index": index,
            "prompt": self._prompts[index].text,
            "text": self._loaded.tokenizer.decode(ids, skip_special_tokens=True),
            "tokens": tokens,
            "iterations": iterations,
            "tokens_per_forward": tokens / max(iterations, 1),
            "finish_reason": "stop" if ids and ids[-1] in ends else "length",
            "token_ids": ids,
        }
