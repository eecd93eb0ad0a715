"""How a process of a gloo group ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """Waits for the other processes, then ends this one without finalising its interpreter.

    A thread of gloo can outlive its group and release a tensor while the interpreter ends; it
    then takes a GIL that is gone, and the process aborts (pytorch#190489).
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
