"""A process a contender, one of them at work at a time."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .contenders import CONTENDERS, Absent, Setup


class Failed(RuntimeError):
    """A contender could not do it; the message is for the record."""


class Contestant:
    """A contender in a process of its own, which holds its model from start to end.

    Args:
        name: of `CONTENDERS`.
        threads: of torch.
        warm_up: batches of prompts that are decoded before anything counts: compilation, tuning.

    Attributes:
        absent: why it does not take part, or None.
    """

    def __init__(
        self, name: str, setup: Setup, threads: int, warm_up: Sequence[list[list[int]]], most: int
    ) -> None:
        self.name = name
        # not forked: torch's threads do not survive it
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, name, setup, threads, list(warm_up), most), daemon=True
        )
        self._process.start()
        theirs.close()
        self.absent: str | None = None
        try:
            self._answer()
        except Failed as error:
            self.absent = str(error)

    def decode(self, prompts: list[list[int]], most: int) -> dict[str, Any]:
        """The fields of `Decoded`, and ``peak_bytes`` meanwhile: of the process, or of the GPU."""
        try:
            self._pipe.send((prompts, most))
        except OSError as error:
            raise self._ended() from error
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self) -> dict[str, Any]:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if kind == "failed":
            raise Failed(value)
        return value

    def _ended(self) -> Failed:
        self._process.join()
        return Failed(f"its process ended with code {self._process.exitcode}")


def _work(
    pipe: Any,
    name: str,
    setup: Setup,
    threads: int,
    warm_up: list[list[list[int]]],
    most: int,
) -> None:
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who interrupts means the parent, which ends us
    os.dup2(2, 1)  # standard output is the parent's
    torch.set_num_threads(threads)
    logging.disable_progress_bar()  # whoever asked shows how far it is
    logging.set_verbosity_error()
    try:
        decode = CONTENDERS[name](setup)
        for prompts in warm_up:
            with suppress(Absent):  # of this batch size; it will say so again where it counts
                decode(prompts, most)
    except Exception as error:
        pipe.send(("failed", _reason(error)))
        return
    pipe.send(("ready", {}))
    while True:
        try:
            prompts, limit = pipe.recv()
        except EOFError:
            return
        try:
            _reset_peak(setup.device)
            found = asdict(decode(prompts, limit)) | {"peak_bytes": _peak_bytes(setup.device)}
            pipe.send(("done", found))
        except Exception as error:
            pipe.send(("failed", _reason(error)))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300] if isinstance(error, Absent) else f"{type(error).__name__}: {text[:300]}"


def _reset_peak(device: str) -> None:
    """Loading a model takes more memory than decoding with it. Where the system does not let a
    process forget its peak (outside Linux), that stays the peak."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
