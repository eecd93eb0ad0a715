from __future__ import annotations

import io

import pytest
from rich.console import Console

from cllm.commands import progress
from cllm.training.collect.folder import ShardRecord
from cllm.training.collect.runner import Workers


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=110, highlight=False), stream


def test_lines_with_speed_and_time_left(clock):
    """A quarter of the work took 30 s: 90 s are left. Between lines there are 10 s."""
    out, stream = console(False)
    with progress.watch_for(out, Workers(1, 2)) as watch:
        watch.begin(5, 1, 20)
        clock[0] += 8
        watch.advance("responses", 5, 0)
        clock[0] += 22
        watch.advance("states", 5, 600)
        watch.shard(ShardRecord(1, 5, None))
        clock[0] += 4000  # five and a half prompts in 4030 s
        watch.advance("responses", 1, 0)
    assert stream.getvalue().splitlines() == [
        "process 1 of 2: continuing: 1 of 5 shards are there",
        "process 1 of 2: 5 of 20 prompts, 1 of 5 shards, 20 tokens/s, 1:30 left",
        "process 1 of 2: 5 of 20 prompts, 2 of 5 shards, 0 tokens/s, 2:57:05 left",
    ]


def test_the_last_line_always_comes(clock):
    out, stream = console(False)
    with progress.watch_for(out, Workers()) as watch:
        watch.begin(1, 0, 2)
        watch.advance("responses", 2, 0)
        clock[0] += 2
        watch.advance("states", 2, 80)
        watch.shard(ShardRecord(0, 2, None))
    assert stream.getvalue() == "2 of 2 prompts, 1 of 1 shards, 40 tokens/s\n"


def test_a_bar_on_a_terminal(clock):
    out, stream = console(True)
    with progress.watch_for(out, Workers()) as watch:
        watch.begin(4, 0, 20)
        clock[0] += 30
        watch.advance("responses", 5, 0)
        watch.advance("states", 5, 600)
    assert "states" in stream.getvalue()
    assert "5/20 prompts, 20 tokens/s, 1:30 left" in stream.getvalue()
