"""The run of `cllm collect`: shard after shard, by one process or many, to a finished folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from ..manifest import Manifest, versions
from ..store import write_shard
from .cleaning import first_of_each, summed
from .folder import Folder, ShardRecord
from .shard import ShardMaker
from .sources import Row
from .statistics import CollectionStatistics


class NothingCollected(ValueError):
    """A finished run of whose prompts none is fit for training; the message says why."""


class Watch(Protocol):
    """Is told how a run goes."""

    def begin(self, shards: int, finished: int, prompts: int) -> None:
        """This process has `shards` to make, of which `finished` are there; `prompts` are to do."""

    def advance(self, stage: str, prompts: int, tokens: int) -> None:
        """`stage` has dealt with so many prompts more; so many response tokens are finished."""

    def shard(self, record: ShardRecord) -> None:
        """A shard is on the disk."""


@dataclass(frozen=True)
class Workers:
    """This process among those that fill a folder together.

    Attributes:
        rank: from 0.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1


def collect(
    folder: Folder,
    rows: Sequence[Row],
    maker: ShardMaker,
    *,
    shard_size: int,
    max_mismatch: float,
    workers: Workers,
    watch: Watch,
) -> None:
    """Make every shard of this process that is not there yet.

    Process r of w makes shards r, r + w, ...: which rows a shard holds depends on the order of
    `rows` and `shard_size` alone, so any number of processes gives the same files.

    Args:
        max_mismatch: largest share of brought responses that are not the model's own output.

    Raises:
        ValueError: if too many responses are not the model's own output, or a logit is NaN.
        OSError: if a file cannot be written; the shards before it are kept.
    """
    first = first_of_each(row.prompt for row in rows)
    mine = range(workers.rank, folder.shards, workers.world_size)
    todo = [number for number in mine if not folder.finished(number)]
    spans = {number: slice(number * shard_size, (number + 1) * shard_size) for number in todo}
    watch.begin(len(mine), len(mine) - len(todo), sum(len(rows[spans[n]]) for n in todo))
    seen: Counter[str] = Counter()
    for number in todo:
        members = rows[spans[number]]
        result = maker.make(members, first[spans[number]], watch.advance)
        path = folder.shard_path(number)
        shard = write_shard(path, result.examples) if result.examples else None
        if shard is None:
            # one of an interrupted run with another outcome would pass for this one's
            path.unlink(missing_ok=True)
        record = ShardRecord(
            number=number,
            prompts=len(members),
            shard=shard,
            dropped=dict(result.dropped),
            statistics=replace(
                CollectionStatistics.of(result.examples), mismatches=result.counts["near_ties"]
            ).to_json(),
            counts=dict(result.counts),
            longest=max((len(example.response) for example in result.examples), default=0),
            seconds=result.seconds,
        )
        folder.finish(record)
        watch.shard(record)
        seen.update(result.counts)
        wrong, checked = seen["mismatched"], seen["checked"]
        # too many for the whole run already, or most of what was seen
        if wrong > max_mismatch * len(rows) or (max_mismatch < 0.5 and wrong > checked / 2):
            raise _not_its_own(wrong, checked, max_mismatch)


def finish(folder: Folder, template: Manifest, *, max_mismatch: float) -> Manifest | None:
    """Write the manifest if every shard is there; None if other processes are still at work.

    It is put together from the shards' own records, so whichever process comes last can write it,
    and a lost one is written again.

    Raises:
        ValueError: if too many responses were not the model's own output.
        NothingCollected: if no row is left, or n is larger than every response.
    """
    with folder.completed() as complete:
        if not complete:
            return None
        records = folder.records()
        counts = total_counts(records)
        if counts["mismatched"] > max_mismatch * counts["checked"]:
            raise _not_its_own(counts["mismatched"], counts["checked"], max_mismatch)
        dropped = summed(record.dropped for record in records)
        prompts = sum(record.prompts for record in records)
        longest = max(record.longest for record in records)
        if not longest:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            raise NothingCollected(f"nothing is left of {prompts} prompts: {reasons}")
        if template.block_size > longest:
            raise NothingCollected(
                f"block_size={template.block_size} is larger than every response: the longest has "
                f"{longest} tokens; choose a smaller one"
            )
        parts = [CollectionStatistics.from_json(record.statistics) for record in records]
        manifest = replace(
            template,
            versions=versions(("torch", "transformers", "tokenizers", "cllm-kernels")),
            shards=[record.shard for record in records if record.shard is not None],
            dropped=dropped,
            statistics=CollectionStatistics.merged(parts).to_json(),
            settings={
                **template.settings,
                "prompts": prompts,
                "counts": dict(counts),
                "seconds": total_seconds(records),
            },
            complete=True,
        )
        manifest.save(folder.path)
        return manifest


def total_counts(records: Sequence[ShardRecord]) -> Counter[str]:
    """The shards' counts, added up."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.counts)
    return total


def total_seconds(records: Sequence[ShardRecord]) -> dict[str, float]:
    """Seconds of work by stage, added up over all shards and so over all processes."""
    total: dict[str, float] = {}
    for record in records:
        for stage, seconds in record.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def digest_of_rows(rows: Sequence[Row]) -> str:
    """A fingerprint of prompts and brought responses, in order."""
    digest = hashlib.sha256()
    for row in rows:
        record = asdict(row)
        del record["prompt"]["line"]
        digest.update(json.dumps(record, sort_keys=True).encode())
    return digest.hexdigest()


def _not_its_own(wrong: int, checked: int, allowed: float) -> ValueError:
    return ValueError(
        f"{wrong} of {checked} responses are not the model's output ({wrong / checked:.0%}, at "
        f"most {allowed:.0%} allowed): were they made by another model, with sampling or with "
        "another prompt? Leave the response column out to have them made, or raise --max-mismatch"
    )
