"""What ``cllm train`` shows: a bar while it runs, a line an evaluation, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation import Evaluation


class TrainView(TrainerCallback):
    """Draws a run on a console; on one that is no terminal, a plain line a log."""

    def __init__(self, console: Console):
        self._console = console
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                TextColumn("step {task.completed} of {task.total}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=state.max_steps, completed=state.global_step, figures=""
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_tokens_per_forward" in logs:
            self.say(f"step {state.global_step}: {evaluation_line(logs)}")
        elif "consistency_loss" in logs:
            figures = (
                f"loss {logs['loss']:.4g} (consistency {logs['consistency_loss']:.4g}, "
                f"AR {logs['ar_loss']:.4g}), {logs['tokens_per_second']:,.0f} tokens/s"
            )
            if self._bar is not None:
                self._bar.update(self._task, figures=figures)
            else:
                self.say(f"step {state.global_step} of {state.max_steps}: {figures}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing; also where the run failed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(line, markup=False, soft_wrap=True)


def evaluation_line(metrics: Mapping[str, float]) -> str:
    """One evaluation in one line, from metrics whose names start with ``eval_``."""
    line = (
        f"{metrics['eval_tokens_per_forward']:.2f} tokens per forward, "
        f"NLL {metrics['eval_nll_under_base']:.3f} (base {metrics['eval_base_nll']:.3f}), "
        f"repetition {metrics['eval_repetition']:.1%} (base {metrics['eval_base_repetition']:.1%}),"
        f" same text {metrics['eval_exact_match']:.0%}"
    )
    inside = "inside" if metrics["eval_inside_bound"] else "outside"
    best = ", best so far" if metrics.get("eval_is_best") else ""
    return f"{line}; {inside} the bound{best}"


def results_table(base: Evaluation, history: list[dict[str, Any]], best_step: int | None) -> Table:
    """Every evaluation of a run beside the base model's: noisy tokens trained on, tokens per
    forward, negative log-likelihood under the base, repetition, share of texts equal to the
    base's, tokens a text.

    Args:
        base: of the base model.
        history: ``trainer.state.log_history``.
        best_step: the step that was chosen, None for none.
    """
    table = Table(
        title=f"{base.prompts} held-out prompts",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    # narrow enough for 80 columns
    for name in ("step", "trained", "per forward", "NLL", "repeated", "same", "length"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    table.add_row("base", "0", *_figures(base.metrics(), ""), "")
    for entry in history:
        if "eval_tokens_per_forward" not in entry:
            continue
        best = entry["step"] == best_step
        inside = "inside" if entry["eval_inside_bound"] else "outside"
        table.add_row(
            str(entry["step"]),
            f"{entry['eval_noisy_tokens']:,.0f}",
            *_figures(entry, "eval_"),
            "inside, best" if best else inside,
            style="bold" if best else None,
        )
    return table


def _figures(metrics: Mapping[str, float], prefix: str) -> list[str]:
    return [
        f"{metrics[prefix + 'tokens_per_forward']:.2f}",
        f"{metrics[prefix + 'nll_under_base']:.3f}",
        f"{metrics[prefix + 'repetition']:.1%}",
        f"{metrics[prefix + 'exact_match']:.0%}",
        f"{metrics[prefix + 'mean_length']:.0f}",
    ]
