"""The mean of checkpoints: of their factors, and only of such as belong together."""

from __future__ import annotations

import json

import pytest
import torch

from cllm import GatedAdapter
from cllm.adapter import AdapterError, LowRank
from cllm.adapter.average import average_adapters, average_folders

from ..decoding.tiny_models import tiny_model
from .adapters import scaled


def moved(adapter, seed, step=None, size=0.3):
    """A later checkpoint: the same weights with noise of `size` times theirs."""
    generator = torch.Generator().manual_seed(seed)

    def shaken(tensor):
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * size
        return (tensor + noise).to(tensor.dtype)

    weights = {
        name: LowRank(shaken(pair.a), shaken(pair.b), pair.scaling)
        for name, pair in adapter.weights.items()
    }
    return GatedAdapter(weights, {**adapter.metadata, "step": step})


@pytest.fixture
def start():
    return GatedAdapter.random(tiny_model("llama"), 3, scale=0.1)


def test_the_mean_of_the_factors(start):
    others = [moved(start, seed, step=100 * seed) for seed in (2, 1)]
    mean = average_adapters([start, *others], [1.0, 2.0, 1.0])
    assert mean.metadata["gated"] is True
    for name, pair in mean.weights.items():
        one, two, three = (adapter.weights[name] for adapter in (start, *others))
        for letter in ("a", "b"):
            expected = sum(
                part * getattr(side, letter).double()
                for part, side in zip((0.25, 0.5, 0.25), (one, two, three), strict=True)
            )
            found = getattr(pair, letter)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-8)
        assert pair.scaling == one.scaling
    assert mean.metadata["step"] == 100 and mean.metadata["averaged"] == [0.25, 0.5, 0.25]
    mean.check(tiny_model("llama"))


def test_it_lies_closer_to_what_checkpoints_lie_around(start):
    checkpoints = [moved(start, seed) for seed in range(8)]
    mean = average_adapters(checkpoints)

    def distance(adapter):
        return sum(
            float((adapter.weights[name].a - pair.a).norm()) for name, pair in start.weights.items()
        )

    assert distance(mean) < 0.5 * min(map(distance, checkpoints))
    assert mean.metadata["averaged"] == [0.125] * 8


def other_rank(start):
    return GatedAdapter.random(tiny_model("llama"), 2, scale=0.1)


def other_modules(start):
    return GatedAdapter.random(tiny_model("llama"), 3, scale=0.1, targets=("q_proj",))


def other_base(start):
    return GatedAdapter(start.weights, {**start.metadata, "base_fingerprint": "0" * 64})


def other_scale(start):
    return scaled(start, 2.0)


def other_run(start):
    return GatedAdapter.random(tiny_model("llama"), 3, scale=0.1, seed=1)


def with_nan(start):
    later = moved(start, 1)
    next(iter(later.weights.values())).b[0, 0] = torch.nan
    return later


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_rank, "adapter 2 has rank 2 in .*, the first one 3"),
        (other_modules, "adapter 2 and the first one have different modules, model.layers.0"),
        (other_base, "trained for different bases"),
        (other_scale, "adapter 2 has the scale 2.0 in .*, the first one 1.0"),
        (other_run, "adapter 2 is unrelated to the first one"),
        (with_nan, "holds NaN or infinity"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_has_no_mean(start, change, message):
    with pytest.raises(AdapterError, match=message):
        average_adapters([start, change(start)])


def test_what_is_known_of_some_alone(start):
    """A base that not all name, and a gate that not all had."""
    unknown = GatedAdapter(moved(start, 1).weights, {"step": 3})
    mean = average_adapters([start, unknown])
    assert mean.metadata["base_fingerprint"] == start.metadata["base_fingerprint"]
    assert mean.metadata["step"] == 3 and mean.metadata["gated"] is False
    with pytest.raises(AdapterError, match="different bases"):
        average_adapters([unknown, start, other_base(start)])


@pytest.mark.parametrize("shares", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_bad_shares(start, shares):
    with pytest.raises(ValueError, match="shares must be 2 positive numbers"):
        average_adapters([start, moved(start, 1)], shares)


def test_nothing_to_average():
    with pytest.raises(ValueError, match="no adapter"):
        average_adapters([])


def test_folders(start, tmp_path):
    folders = [
        moved(start, step, step=step).save(tmp_path / f"checkpoint-{step}") for step in (20, 40)
    ]
    recipes = {folder: {"arguments": {"name": folder.name}} for folder in folders}
    for folder, recipe in recipes.items():
        (folder / "cllm_recipe.json").write_text(json.dumps(recipe))
    written = average_folders(folders, tmp_path / "new" / "mean")
    assert GatedAdapter.load(written).metadata["averaged"] == [0.5, 0.5]
    recipe = json.loads((written / "cllm_recipe.json").read_text())
    assert recipe["arguments"]["name"] == "checkpoint-40"
    before = (written / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="is there already"):
        average_folders(folders[:1], written)
    with pytest.raises(AdapterError, match="is no adapter"):
        average_folders([tmp_path / "nothing"], written, overwrite=True)
    assert (written / "adapter_model.safetensors").read_bytes() == before
    average_folders(folders[:1], written, overwrite=True)
    assert (written / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in written.parent.iterdir()] == ["mean"]
