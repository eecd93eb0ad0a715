"""``cllm``: the command line. `main` turns every error into one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .commands import adapter, bench, collect, demo, generate, info, report, train, tune
from .commands.common import CommandError, CommandInterrupted, one_line

app = typer.Typer(
    name="cllm",
    help="Jacobi decoding of HuggingFace causal language models: several tokens per forward pass, "
    "the same output.",
    no_args_is_help=True,
    add_completion=False,
    # rich's own markup would take "[default: ...]" for a style and drop it
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("collect")(collect.collect)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("bench")(bench.bench)
app.command("info")(info.info)
app.command("report")(report.report)
app.add_typer(adapter.app, name="adapter")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"cllm-kernels {info.versions()['cllm-kernels']}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    # no docstring: it would replace the app's help
    return None


def main(argv: list[str] | None = None) -> int:
    """Run ``cllm`` with `argv` (by default the process's arguments); returns the exit code.

    0 done; 1 the run itself failed; 2 bad usage or input; 130 interrupted; 141 the reader of
    standard output left.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = app(args=arguments, prog_name="cllm", standalone_mode=False)
        return _interrupted("interrupted") if code == 130 else int(code or 0)
    except CommandInterrupted as error:
        return _interrupted(one_line(error))
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted("interrupted")
    except BrokenPipeError:
        # head and less may leave early; keep the interpreter from flushing into the closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("CLLM_DEBUG") == "1":
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    # usage errors of typer, by what they can do: their class has moved between its versions
    usage = getattr(error, "format_message", None)
    if usage is not None:
        text = " ".join(usage().split())
        if not text:
            # no arguments at all: the help was printed
            return 2
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "cllm"
        return _fail(f"{text} (see {command} --help)", 2)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return _fail(f"{error.filename}: {error.strerror}", 2)
    from .default_model import ModelError

    # PromptError, TrajectoryError, ReportError and the decoder's own refusals are ValueErrors
    if isinstance(error, (CommandError, ModelError, ValueError, OSError)):
        return _fail(one_line(error), 2)
    return _fail(f"{type(error).__name__}: {one_line(error)} (--debug shows where)", 1)


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"cllm: error: {message}\n")
    return code


def _interrupted(message: str) -> int:
    sys.stderr.write(f"cllm: {message}\n")
    return 130


if __name__ == "__main__":
    sys.exit(main())
