"""``cllm adapter``: the mean of checkpoints, and an adapter made ready to be given away."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import CommandError, diagnostics, load
from .options import DebugOption, Dtype, ModelOption

app = typer.Typer(
    help="Gated adapters: average checkpoints, make one ready to be given away.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command("export")
def export(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder that `cllm train --gated` wrote.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", help="Folder to make; its name is the adapter's.")
    ],
    model: ModelOption = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="HUB_ID",
            help="What the base is called.  [default: --model, where it is a hub id]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Precision of the written weights.")
    ] = Dtype.bfloat16,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size", min=1, help="Best n to decode with.  [default: that of the training]"
        ),
    ] = None,
    verify_size: Annotated[
        int | None, typer.Option("--verify-size", min=1, help="Best number of verified tokens.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="What it was trained for; may be given several times."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            metavar="FILE.json",
            help='{"TASK": {"prompts": N, "tokens_per_forward": {"base": X, "adapter": Y}, '
            '"identical": N}} for the model card.',
        ),
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            "--facts",
            metavar="FILE.json",
            help='Texts of the model card: "data", "recipe", "tokens", "time", "hardware".',
        ),
    ] = None,
    max_mib: Annotated[
        float, typer.Option("--max-mib", min=0.001, help="Refuse larger weights.")
    ] = 16.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter that DEST holds.")
    ] = False,
    debug: DebugOption = False,
) -> int:
    """Write a trained gated adapter as a folder to give away: weights, metadata, model card.

    It is checked against its base, and names of this machine's files are left out.
    """
    from .. import default_model

    named = base_model or (default_model.HUB_ID if model is None else model)
    records = {name: _read_json(path) for name, path in (("results", results), ("facts", facts))}
    errors = diagnostics()
    loaded = load(model, Dtype.float32, "cpu", None, errors)
    with errors.status("writing the adapter"):
        from ..adapter.export import export_adapter
        from ..models import DTYPES

        written = export_adapter(
            source,
            destination,
            loaded.model,
            base_model=named,
            dtype=DTYPES[dtype.value],
            block_size=block_size,
            verify_size=verify_size,
            tasks=task,
            limit=round(max_mib * 2**20),
            overwrite=overwrite,
            **records,
        )
    size = sum(file.stat().st_size for file in written.iterdir()) / 2**20
    sys.stdout.write(f"adapter: {written} ({size:.1f} MiB)\n")
    return 0


@app.command("average")
def average(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Folders of checkpoints, or of adapters."),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DEST", help="Folder to make.", show_default=False)
    ],
    share: Annotated[
        list[float] | None,
        typer.Option("--share", help="Of each source, in order.  [default: equal ones]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter that DEST holds.")
    ] = False,
    debug: DebugOption = False,
) -> int:
    """Write the mean of several checkpoints' weights, which mostly guesses better than each.

    For checkpoints of one run, or of runs that went on from the same adapter (`--lora-from`). What
    is known of the last one, its recipe for one, is written beside the weights.
    """
    from ..adapter.average import average_folders

    if share and len(share) != len(sources):
        raise CommandError(
            f"--share was given {len(share)} times for {len(sources)} folders; give one for each, "
            "or none"
        )
    with diagnostics().status("averaging"):
        written = average_folders(sources, output, share, overwrite=overwrite)
    sys.stdout.write(f"adapter: {written}\n")
    return 0


def _read_json(path: Path | None) -> Any:
    import json

    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{path} is not JSON: {error}") from error
