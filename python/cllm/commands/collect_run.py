"""The run behind ``cllm collect``: a loaded model, a folder, and what is said at the end."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import CommandError, CommandInterrupted, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from ..models import LoadedModel
    from ..responders import Engine
    from ..training.collect.folder import Folder
    from ..training.collect.runner import Workers
    from ..training.collect.shard import CollectOptions
    from ..training.collect.sources import Row
    from ..training.manifest import Manifest


class CollectRun:
    """Everything but the model."""

    def __init__(
        self,
        rows: list[Row],
        options: CollectOptions,
        source: dict[str, Any],
        output: Path,
        workers: Workers,
        errors: Console,
    ) -> None:
        self._rows, self._options, self._source = rows, options, source
        self._output, self._workers, self._errors = output, workers, errors

    def run(
        self,
        loaded: LoadedModel,
        engine: Engine,
        max_mismatch: float,
        overwrite: bool,
        as_json: bool,
    ) -> int:
        """Collect, and show what was collected."""
        from dataclasses import replace

        from ..responders import end_tokens, make_responder
        from ..training.collect.folder import Folder
        from ..training.collect.runner import collect, finish
        from ..training.collect.shard import ShardMaker
        from ..verification import near_tie_tolerance
        from .progress import watch_for

        model = loaded.model
        options = replace(self._options, tolerance=near_tie_tolerance(model.dtype))
        responder = make_responder(model, engine, block_size=options.block_size)
        maker = ShardMaker(model, loaded.tokenizer, responder, options, end_tokens(model))
        manifest = self._manifest(loaded, engine, options)
        folder = Folder(
            self._output,
            _compared(manifest, loaded),
            prompts=len(self._rows),
            shard_size=options.shard_size,
            rank=self._workers.rank,
            world_size=self._workers.world_size,
            overwrite=overwrite,
        )
        started = time.perf_counter()
        with closing(folder):
            try:
                with watch_for(self._errors, self._workers) as watch:
                    collect(
                        folder,
                        self._rows,
                        maker,
                        shard_size=options.shard_size,
                        max_mismatch=max_mismatch,
                        workers=self._workers,
                        watch=watch,
                    )
                finished = finish(folder, manifest, max_mismatch=max_mismatch)
            except KeyboardInterrupt as error:
                raise CommandInterrupted(f"interrupted: {_kept(folder)}") from error
            except OSError as error:
                name = f"{error.filename}: " if error.filename else ""
                reason = error.strerror or str(error)
                raise CommandError(f"{name}{reason}; {_kept(folder)}") from error
            if finished is None:
                self._errors.print(
                    f"process {self._workers.rank} is done; the others are still at work "
                    f"({folder.finished_shards()} of {folder.shards} shards)",
                    soft_wrap=True,
                )
                return 0
        from .summary import print_summary

        if as_json:
            write_json({"output": str(self._output), **finished.to_json()})
        else:
            print_summary(finished, self._output, time.perf_counter() - started)
        return 0

    def _manifest(self, loaded: LoadedModel, engine: Engine, options: CollectOptions) -> Manifest:
        """The manifest but for what only the shards know."""
        from ..training.collect.runner import digest_of_rows
        from ..training.manifest import Manifest, tokenizer_hash

        settings = asdict(options)
        for name in ("block_size", "fill", "seed"):
            del settings[name]
        template = getattr(loaded.tokenizer, "chat_template", None)
        return Manifest(
            model=loaded.name,
            revision=getattr(loaded.model.config, "_commit_hash", None),
            tokenizer_hash=tokenizer_hash(loaded.tokenizer),
            block_size=options.block_size,
            fill=options.fill,
            seed=options.seed,
            settings={
                **settings,
                "template": template if options.chat_template else None,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "engine": engine,
                "source": self._source,
                "rows": digest_of_rows(self._rows),
            },
            complete=False,
        )


def _compared(manifest: Manifest, loaded: LoadedModel) -> dict[str, Any]:
    """What a run that continues must have in common with the one before."""
    names = ("revision", "tokenizer_hash", "block_size", "fill", "seed")
    # one folder has many names
    model = str(loaded.folder.resolve()) if loaded.folder is not None else loaded.name
    # how the rows were chosen is all one as long as they are the same
    chosen = {name: value for name, value in manifest.settings.items() if name != "source"}
    return {"model": model, **{name: getattr(manifest, name) for name in names}, **chosen}


def _kept(folder: Folder) -> str:
    return (
        f"{folder.finished_shards()} of {folder.shards} shards are in {folder.path}; "
        "run the same command to continue"
    )
