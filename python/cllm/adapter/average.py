"""The mean of several checkpoints' weights, which mostly guesses better than each of them."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import AdapterError
from .export import RECIPE, check_destination, move_into_place
from .gated import GatedAdapter
from .peft_format import find_folder
from .weights import LowRank

# Cosine of the A matrices of two checkpoints, all of them in one vector. Those of one run, or of
# two that began at one adapter, are above 0.8; of unrelated runs near 0, and their mean is noise.
_LEAST_COSINE = 0.5


def average_adapters(
    adapters: Sequence[GatedAdapter], shares: Sequence[float] | None = None
) -> GatedAdapter:
    """The weighted mean of the factors A and B, each by itself, in fp32.

    Weights that were trained at a high learning rate lie around a better point than any of them
    (stochastic weight averaging, Izmailov et al. 2018, arXiv 1803.05407; averages of runs from one
    start: Wortsman et al. 2022, arXiv 2203.05482). The mean of products B A is not the product of
    the means, so this is for checkpoints that lie close: of one run, or of runs that began at the
    same adapter.

    Args:
        adapters: at least one, of equal modules, ranks and scales.
        shares: one positive number each, in any unit; None: equal ones.

    Returns:
        An adapter with the metadata of the last one, and ``averaged``: the shares, which add up to
        1. It counts as gated if all are.

    Raises:
        AdapterError: adapters of other modules, shapes, scales or bases, or of unrelated runs;
            weights that are NaN or infinite.
        ValueError: no adapter, or shares that do not fit.
    """
    if not adapters:
        raise ValueError("there is no adapter to average")
    given = [1.0] * len(adapters) if shares is None else [float(share) for share in shares]
    if len(given) != len(adapters) or not all(math.isfinite(s) and s > 0 for s in given):
        raise ValueError(
            f"shares must be {len(adapters)} positive numbers, one for each adapter, not {given}"
        )
    parts = [share / sum(given) for share in given]
    if len(_bases(adapters)) > 1:
        raise AdapterError("the adapters were trained for different bases, by their fingerprints")
    first = adapters[0]
    for number, other in enumerate(adapters[1:], start=2):
        _check_alike(first, other, number)
    for adapter in adapters:
        for name, pair in adapter.weights.items():
            pair.check_finite(name)
    _check_related(adapters)
    weights = {
        name: LowRank(
            _mean([adapter.weights[name].a for adapter in adapters], parts),
            _mean([adapter.weights[name].b for adapter in adapters], parts),
            pair.scaling,
        )
        for name, pair in first.weights.items()
    }
    metadata = {**adapters[-1].metadata, "averaged": [round(p, 6) for p in parts]}
    if bases := _bases(adapters):
        metadata["base_fingerprint"] = bases[0]
    metadata["gated"] = all(adapter.metadata.get("gated") is True for adapter in adapters)
    return GatedAdapter(weights, metadata)


def _bases(adapters: Sequence[GatedAdapter]) -> list[str]:
    """The fingerprints that occur."""
    found = (adapter.metadata.get("base_fingerprint") for adapter in adapters)
    return list(dict.fromkeys(str(base) for base in found if base is not None))


def _mean(tensors: Sequence[torch.Tensor], parts: Sequence[float]) -> torch.Tensor:
    out = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, part in zip(tensors, parts, strict=True):
        out.add_(tensor.float(), alpha=part)
    return out


def _check_alike(first: GatedAdapter, other: GatedAdapter, number: int) -> None:
    if missing := sorted(first.weights.keys() ^ other.weights.keys()):
        raise AdapterError(
            f"adapter {number} and the first one have different modules, {missing[0]} for one"
        )
    for name, pair in first.weights.items():
        theirs = other.weights[name]
        if (pair.a.shape, pair.b.shape) != (theirs.a.shape, theirs.b.shape):
            raise AdapterError(
                f"adapter {number} has rank {theirs.rank} in {name}, the first one {pair.rank}; "
                "only equal shapes have a mean"
            )
        if pair.scaling != theirs.scaling:
            raise AdapterError(
                f"adapter {number} has the scale {theirs.scaling} in {name}, the first one "
                f"{pair.scaling}; average checkpoints of equal lora_alpha"
            )


def _check_related(adapters: Sequence[GatedAdapter]) -> None:
    def flat(adapter: GatedAdapter) -> torch.Tensor:
        return torch.cat([adapter.weights[name].a.float().flatten() for name in names])

    names = sorted(adapters[0].weights)
    first = flat(adapters[0])
    for number, adapter in enumerate(adapters[1:], start=2):
        cosine = float(torch.nn.functional.cosine_similarity(first, flat(adapter), dim=0))
        if not cosine >= _LEAST_COSINE:
            raise AdapterError(
                f"adapter {number} is unrelated to the first one (cosine {cosine:.2f} of their A "
                "matrices); average checkpoints of one run, or of runs that began at one adapter"
            )


def average_folders(
    sources: Sequence[str | Path],
    destination: str | Path,
    shares: Sequence[float] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """`average_adapters` of folders, or hub ids, as a folder.

    The recipe of the last source goes with it, for `export_adapter`.

    Returns:
        The destination, which appears whole or not at all.

    Raises:
        As `average_adapters`; AdapterError: a source that cannot be read, or something that stands
        at `destination`. OSError: a folder that cannot be written.
    """
    destination = Path(os.path.abspath(Path(destination).expanduser()))
    check_destination(destination, overwrite)
    folders = [find_folder(source) for source in sources]
    adapters = [GatedAdapter.load(folder) for folder in folders]
    mean = average_adapters(adapters, shares)
    recipe = folders[-1] / RECIPE
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        mean.save(part)
        if recipe.is_file():
            shutil.copyfile(recipe, part / RECIPE)
        part.chmod(0o755)
        move_into_place(part, destination)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return destination
