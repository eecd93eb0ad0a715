"""Two processes, each with a part of the batch, make the gradients of the whole batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

import cllm
from cllm import ConsistencyConfig
from cllm.training.packing import ConsistencyCollator, batch_statistics
from tests.training.definition import every_state, random_example
from tests.training.exact import exact_model

CONFIG = ConsistencyConfig(ar_weight=0.7)
SAMPLES = [every_state(random_example(1)), every_state(random_example(2, prompt=3, response=6))]


def batch_of(samples):
    return ConsistencyCollator(CONFIG, column_multiple=8, row_multiple=4)(samples)


def whole_batch(config):
    """Loss, gradients and the totals of the batch, in one process."""
    model = exact_model().train()
    cllm.patch_training(model, config)
    batch = batch_of(SAMPLES)
    output = model(**batch)
    output.loss.backward()
    counts = batch_statistics(batch)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.loss.detach(), gradients, (float(counts.rows), float(counts.labels))


def wrapped(model, how):
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    if how == "fsdp2 with the head by itself":
        fully_shard(model.lm_head)
    return fully_shard(model)


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for teacher in ("self", "ema"):
        config = replace(CONFIG, teacher=teacher)
        whole = whole_batch(config)
        for how in ("ddp", "fsdp2", "fsdp2 with the head by itself"):
            check(rank, how, config, *whole)
            Path(folder, f"{rank} {how} {teacher}.done").touch()
    dist.destroy_process_group()


def check(rank, how, config, loss, expected, totals):
    inner = exact_model().train()
    handle = cllm.patch_training(inner, config)
    model = wrapped(inner, how)
    output = model(**batch_of([SAMPLES[rank]]), totals=totals)
    # gradients are averaged over processes, so each loss counts twice
    (output.loss * 2).backward()
    summed = output.loss.detach().clone()
    dist.all_reduce(summed)
    torch.testing.assert_close(summed, loss, rtol=1e-12, atol=0)
    for name, parameter in inner.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    handle.update_teacher()  # of a sharded model: each process averages the whole weights


@pytest.mark.slow
def test_two_processes_make_the_gradients_of_one(tmp_path):
    multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)
    assert len(list(tmp_path.glob("*.done"))) == 2 * 2 * 3
