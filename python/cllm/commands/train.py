"""``cllm train``: trajectories to a consistency LLM, from flags or a recipe file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import CommandInterrupted, diagnostics
from .options import DebugOption, Dtype

if TYPE_CHECKING:
    from rich.console import Console

    from ..training.arguments import ConsistencyTrainingArguments
    from ..training.trainer import ConsistencyTrainer


def train(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="RECIPE.yaml",
            help="Settings by the names of these flags (and of every field of transformers' "
            "TrainingArguments); flags win.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH_OR_HUB_ID",
            help="Model to train: the one whose trajectories they are.  [default: "
            "SmolLM2-135M-Instruct]",
            show_default=False,
        ),
    ] = None,
    trajectories: Annotated[
        list[str] | None,
        typer.Option(
            "--trajectories", metavar="FOLDER", help="From `cllm collect`; may be given again."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FOLDER", help="For models and checkpoints.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="The highest one.  [default: 2e-5]")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Times through the responses.  [default: 1]")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, help="Optimiser steps instead of epochs.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Responses a forward and process.  [default: 1]"),
    ] = None,
    gradient_accumulation: Annotated[
        int | None,
        typer.Option("--gradient-accumulation", min=1, help="Forwards a step.  [default: 1]"),
    ] = None,
    row_tokens: Annotated[
        int | None,
        typer.Option("--row-tokens", min=1, help="Pack responses into rows of so many tokens."),
    ] = None,
    lora_r: Annotated[
        int | None, typer.Option("--lora-r", min=0, help="Rank of LoRA; 0 trains all weights.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", help="Scale of LoRA.  [default: twice r]")
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option("--lora-targets", help="Module names, by commas.  [default: all-linear]"),
    ] = None,
    lora_from: Annotated[
        str | None,
        typer.Option(
            "--lora-from", metavar="FOLDER", help="Go on from the adapter in this folder."
        ),
    ] = None,
    merge_lora: Annotated[
        bool | None,
        typer.Option("--merge-lora", help="Save plain models with the adapters merged."),
    ] = None,
    gated: Annotated[
        bool | None,
        typer.Option(
            "--gated",
            help="Train the adapter to guess and decide nothing: the text stays the base model's. "
            "Needs --lora-r or --lora-from.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Precision of the weights.  [default: float32]")
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16", help="Compute in bfloat16, keep weights as they are.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory: activations are made twice."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="self (the paper's), base or ema.  [default: self]"),
    ] = None,
    ar_weight: Annotated[
        float | None,
        typer.Option("--ar-weight", help="Weight of the autoregressive loss.  [default: 10]"),
    ] = None,
    consistency: Annotated[
        str | None, typer.Option("--consistency", help="global or local.  [default: global]")
    ] = None,
    divergence: Annotated[
        str | None,
        typer.Option("--divergence", help="forward_kl, reverse_kl or jsd.  [default: forward_kl]"),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            "--sampling",
            help="Noisy states: per_block, uniform, schedule, sliding or visited (of a gated "
            "adapter).  [default: per_block]",
        ),
    ] = None,
    states: Annotated[
        int | None,
        typer.Option(
            "--states",
            min=1,
            help="Noisy states a block; of uniform and visited, a response.  [default: 1]",
        ),
    ] = None,
    augment: Annotated[
        float | None,
        typer.Option(
            "--augment",
            help="Behind each state one more, with this share of what is wrong put right "
            "(the paper: about 0.5).  [default: 0, none]",
        ),
    ] = None,
    eval_prompts: Annotated[
        str | None,
        typer.Option(
            "--eval-prompts", metavar="FILE", help="Held-out prompts to measure speed and quality."
        ),
    ] = None,
    eval_column: Annotated[
        str | None,
        typer.Option("--eval-column", help="Column with the prompt.  [default: prompt]"),
    ] = None,
    eval_template: Annotated[
        str | None,
        typer.Option("--eval-template", help="Prompt made of several columns: text with {column}."),
    ] = None,
    eval_limit: Annotated[
        int | None,
        typer.Option("--eval-limit", min=1, help="Use the first so many.  [default: 32]"),
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option("--eval-steps", min=1, help="Steps from evaluation to evaluation.")
    ] = None,
    eval_max_new_tokens: Annotated[
        int | None,
        typer.Option("--eval-max-new-tokens", min=1, help="Longest text there.  [default: 128]"),
    ] = None,
    stop_on_quality: Annotated[
        bool | None,
        typer.Option(
            "--stop-on-quality/--no-stop-on-quality",
            help="End when quality leaves its bound.  [default: stop]",
        ),
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option("--save-steps", min=1, help="Steps from checkpoint to checkpoint.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", metavar="last|FOLDER", help="Go on from the last checkpoint, or from one."
        ),
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option("--report-to", help="tensorboard, wandb, ... (by commas).  [default: none]"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of order and noise.")] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads for torch.")
    ] = None,
    debug: DebugOption = False,
) -> int:
    """Train a consistency LLM on the trajectories that `cllm collect` wrote.

    For several GPUs: `torchrun --nproc-per-node 8 -m cllm.cli train ...`.
    """
    flags = {name: value for name, value in locals().items() if name not in ("config", "debug")}
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    if "lora_targets" in given and given["lora_targets"] != "all-linear":
        given["lora_targets"] = _split(given["lora_targets"])
    if "report_to" in given:
        given["report_to"] = _split(given["report_to"])
    console = diagnostics()
    with console.status("starting torch and transformers"):
        from .train_settings import prepare, read_settings, training_arguments

        own, arguments = read_settings(config, given)
        args = training_arguments(own, arguments)
    console.quiet = args.process_index != 0
    trainer = prepare(own, args, console)
    return _run(trainer, own, args, console)


def _run(
    trainer: ConsistencyTrainer,
    own: dict[str, Any],
    args: ConsistencyTrainingArguments,
    console: Console,
) -> int:
    from transformers.trainer_callback import PrinterCallback

    from .train_view import TrainView

    resume = own.get("resume")
    view = TrainView(console)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(view)
    if trainer.held_out is not None:
        view.say(f"measuring the base model on {len(trainer.held_out)} held-out prompts")
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except KeyboardInterrupt as error:
        from ..training.checkpoints import last_checkpoint

        found = last_checkpoint(trainer.output_folder)
        kept = (
            "no checkpoint was written yet"
            if found is None
            else (f"{found} is there; go on with --resume last")
        )
        raise CommandInterrupted(f"interrupted at step {trainer.state.global_step}: {kept}") from (
            error
        )
    finally:
        view.close()
    trainer.save_model()
    trainer.save_state()  # every log and evaluation of the run: trainer_state.json
    if args.process_index == 0:
        _report(trainer, args)
    # processes leave together, their group closed: torch warns or aborts otherwise
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0


def _report(trainer: ConsistencyTrainer, args: ConsistencyTrainingArguments) -> None:
    from rich.console import Console

    from .train_view import results_table

    console = Console(file=sys.stdout, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    watch = trainer.watch
    base = trainer.base_evaluation
    if base is not None:
        console.print(results_table(base, trainer.state.log_history, watch.best_step))
        if trainer.stopped_because:
            say(
                f"stopped at step {trainer.state.global_step}: quality left its bound "
                f"({'; '.join(trainer.stopped_because)})"
            )
        if watch.best_step is None:
            say(
                "no evaluation was inside the quality bound: there is no best checkpoint; raise "
                "ar_weight, lower learning_rate, or train with teacher base"
            )
        else:
            say(
                f"best model, step {watch.best_step}, {watch.best_tokens_per_forward:.2f} tokens "
                f"per forward: {trainer.best_folder}"
            )
    say(f"last model, step {trainer.state.global_step}: {trainer.output_folder}")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
