"""Two gloo processes on the CPU give the losses, the weights and the evaluation of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cllm
import cllm_kernels
from cllm.training.store import load_trajectories as load

from .distributed_run import main
from .sharded_run import steps as sharded_steps

# three processes that load torch at a time: a busy machine takes minutes
pytestmark = [pytest.mark.slow, pytest.mark.timeout(330)]

SETTINGS = {
    "use_cpu": torch.accelerator.is_available(),  # without one it goes without saying
    "optim": "sgd",
    "learning_rate": 1e-4,
    "max_grad_norm": 0.0,
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "stop_on_quality": False,
}


def launch(arguments: list[str], good: bool = True) -> subprocess.CompletedProcess[str]:
    """Two processes of a module with its arguments."""
    roots = {str(Path(package.__file__).parents[1]) for package in (cllm, cllm_kernels)}
    here = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, *sorted(roots), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [sys.executable, *torchrun, "-m", *arguments],
        env=environment,
        cwd=here,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (finished.returncode == 0) == good, finished.stderr[-4000:]
    return finished


def run(trajectories: Path, output: Path, **settings: object) -> dict:
    """What two processes of `distributed_run` left."""
    given = json.dumps({**SETTINGS, **settings})
    launch(["tests.training.distributed_run", str(trajectories), str(output), given])
    return json.loads((output / "result.json").read_text())


@pytest.fixture(scope="module")
def alone(trajectories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    given = json.dumps({**SETTINGS, "per_device_train_batch_size": 2})
    main(str(trajectories), str(folder), given)
    return folder, json.loads((folder / "result.json").read_text())


def compare(alone, folder, result):
    before, expected = alone
    assert (expected["processes"], result["processes"]) == (1, 2)
    assert len(expected["losses"]) == 4
    for one, two in zip(expected["losses"], result["losses"], strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    assert result["trained"] == expected["trained"]
    names = ("eval_tokens", "eval_forwards", "eval_nll_under_base", "eval_exact_match")
    assert len(expected["evaluations"]) == 2
    for one, two in zip(expected["evaluations"], result["evaluations"], strict=True):
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names])
    weights = load_file(before / "model.safetensors")
    others = load_file(folder / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-6)


def test_ddp_is_one_process(alone, trajectories, tmp_path):
    result = run(trajectories, tmp_path, per_device_train_batch_size=1)
    compare(alone, tmp_path, result)


def test_visited_windows_are_those_of_one_process(trajectories, tmp_path):
    """Each process moves the windows of its own responses, and all know them an epoch later."""
    settings = {
        **{name: value for name, value in SETTINGS.items() if not name.startswith("eval")},
        **{"gated": True, "lora_r": 4, "learning_rate": 0.1, "gradient_accumulation_steps": 1},
        **{"sampling": "visited", "states": 3, "window_size": 5},
    }
    # an epoch's last step is smaller where a process has no response left, so whole epochs only
    steps = {"per_device_train_batch_size": 2, "max_steps": 3 * (len(load(trajectories)) // 2)}
    main(str(trajectories), str(tmp_path / "alone"), json.dumps({**settings, **steps}))
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())
    steps["per_device_train_batch_size"] = 1
    given = json.dumps({**settings, **steps})
    launch(["tests.training.distributed_run", str(trajectories), str(tmp_path / "two"), given])
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert (alone["processes"], two["processes"]) == (1, 2)
    assert len(two["losses"]) == steps["max_steps"] > 6
    for one, other in zip(alone["losses"], two["losses"], strict=True):
        # a divergence near 0 is a difference of numbers near 1, which fp32 rounds at 1e-7
        assert other == pytest.approx(one, rel=1e-6, abs=1e-7)
    assert two["trained"] == alone["trained"]


def test_fsdp2_is_one_process(trajectories, tmp_path):
    # accelerate shards on GPUs only, so this is torch's own FSDP2 around the patched model
    alone = sharded_steps(trajectories)
    launch(["tests.training.sharded_run", str(trajectories), str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (alone["processes"], result["processes"]) == (1, 2)
    assert result["sharded"] and not alone["sharded"]
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert result["norms"] == pytest.approx(alone["norms"], rel=1e-6)


def test_fsdp_that_would_not_shard_is_refused(trajectories, tmp_path):
    given = json.dumps({"fsdp": True, "max_steps": 1})
    finished = launch(
        ["tests.training.distributed_run", str(trajectories), str(tmp_path), given], good=False
    )
    assert "accelerate does not shard a model on cpu" in finished.stderr
