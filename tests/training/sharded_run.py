"""A plain loop over a patched model, sharded by torch's FSDP2 where there are two processes:
``python -m tests.training.sharded_run TRAJECTORIES RESULT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cllm import ConsistencyConfig, patch_training
from cllm.training.meter import Counts
from cllm.training.packing import ConsistencyCollator
from cllm.training.sampling import SampledDataset
from cllm.training.store import load_trajectories
from tests.decoding.tiny_models import fresh_model
from tests.training.leaving import leave

STEPS, BATCH = 3, 4


def steps(trajectories: Path | str) -> dict[str, Any]:
    """Losses of a few steps of gradient descent, and the norm of every weight after them."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = fresh_model("llama").train()
    config = ConsistencyConfig()
    patch_training(model, config)
    if processes > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    data = SampledDataset(load_trajectories(trajectories), config)
    collator = ConsistencyCollator(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for step in range(STEPS):
        samples = [data[(step * BATCH + index) % len(data)] for index in range(BATCH)]
        counts = Counts.of(collator(samples))
        batch = collator(samples[rank::processes])
        loss = model(**batch, totals=(counts.rows, counts.labels)).loss
        # a process has its share of the sum, and gradients are averaged
        (loss * processes).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    whole = [_whole(parameter) for parameter in model.parameters()]
    return {
        "processes": processes,
        "sharded": any(hasattr(parameter, "full_tensor") for parameter in model.parameters()),
        "losses": losses,
        "norms": [float(value.norm()) for value in whole],
    }


def _whole(parameter: Any) -> torch.Tensor:
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = steps(sys.argv[1])
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
    leave()
