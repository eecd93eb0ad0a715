"""Whole iterations as one CUDA graph, launched ahead of what the host knows.

The graph holds all of a `WindowIteration`: embedding, model, argmax, fixed-point step, and the
guesses of the next window. It works on buffers at fixed addresses, which a call's state is copied
into and its text out of. An iteration then costs the host one launch and, one iteration late, the
look at a few numbers in pinned memory: the device goes from one iteration to the next without a
pause. Rows that have ended write nothing, so what runs meanwhile changes no text.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from dataclasses import replace
from typing import Any

import torch

from .cache import VIEW_STEP, round_up
from .capturing import Capture
from .config import JacobiConfig
from .graphs import MOST_KEPT, GraphedForward
from .lookup import Lookup
from .loop import DecodingLoop, HostView, WindowIteration, WindowState
from .stopping import StopRules

# Text, in columns, and stop ids come in multiples of these, so that calls share captures.
_COLUMNS = VIEW_STEP
_STOP_IDS = 8
_NO_TOKEN = -1


class Readback:
    """Copies of one small tensor on the host, for which no launch has to wait.

    Args:
        shape: of the tensor, which is int64.
        device: where it is.
    """

    def __init__(self, shape: torch.Size, device: torch.device):
        self._device = device
        self._pinned = device.type == "cuda"
        # two: one is read while the next iteration's is written
        self._copies = [
            torch.empty(shape, dtype=torch.long, device="cpu", pin_memory=self._pinned)
            for _ in range(2)
        ]
        self._events: deque[Any] = deque()
        self._started = self._read = 0

    def start(self, values: torch.Tensor) -> None:
        """Copy `values` behind what has been launched; at most two copies are unread."""
        self._copies[self._started % 2].copy_(values, non_blocking=True)
        self._started += 1
        self._events.append(self._event())

    @property
    def unread(self) -> int:
        return self._started - self._read

    def wait(self) -> None:
        """Until the oldest unread copy is there."""
        if self._events[0] is not None:
            self._events[0].synchronize()

    def next(self) -> list[list[int]]:
        """The oldest unread copy, once it is there."""
        self.wait()
        self._events.popleft()
        found: list[list[int]] = self._copies[self._read % 2].tolist()
        self._read += 1
        return found

    def settle(self) -> None:
        """Wait for all that has been launched, and forget what is unread."""
        event = self._event()
        if event is not None:
            event.synchronize()
        self._events.clear()
        self._read = self._started

    def _event(self) -> Any:
        """Marks this point of the device's work; None where that is done by now."""
        if not self._pinned:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event


class StaticIteration:
    """The buffers of one captured iteration, and its capture.

    Attributes:
        state: what a call's is copied to; its sequences and fill may be wider.

    Args:
        call: an iteration whose sizes the buffers get.
    """

    def __init__(self, call: WindowIteration):
        own = call.state
        batch, columns = own.sequences.shape
        room = round_up(columns, _COLUMNS)
        self.state = WindowState(
            sequences=own.sequences.new_zeros(batch, room),
            window=torch.zeros_like(own.window),
            lengths=torch.zeros_like(own.lengths),
            generated=torch.zeros_like(own.generated),
            progress=torch.zeros_like(own.progress),
            done=torch.zeros_like(own.done),
            limits=torch.zeros_like(own.limits),
            stop_ids=own.stop_ids.new_zeros(_stop_places(own)),
            fill=None if own.fill is None else own.fill.new_zeros(batch, room + call.config.width),
        )
        self._pool = None if call.pool is None else call.pool.clone()
        self._odds = None if call.odds is None else call.odds.clone()
        self._lookup = None
        if call.lookup is not None:
            self._lookup = Lookup(
                call.lookup.longest, call.lookup.least, call.lookup.starts.clone()
            )
        # a fixed cache has room for every length, so the host need not know any
        self._host = HostView([0] * batch, [0] * batch, room)
        self._call: WindowIteration | None = None
        self._captured: Capture | None = None
        self._readback = Readback(torch.Size((batch, 4)), own.sequences.device)

    def captured(self, call: WindowIteration, forward: GraphedForward) -> StaticIteration:
        """This, with the capture of the iteration. `call` is left as it is, but for places of its
        cache that its next forward overwrites.

        Raises:
            as `GraphedForward.captured`.
        """
        self.enter(call)
        self.state.done.fill_(True)  # runs before the capture commit nothing
        self._captured = forward.captured(self._run)
        return self

    def enter(self, call: WindowIteration) -> WindowIteration:
        """`call`, which a capture was made for, on these buffers, which take over its state."""
        own, state = call.state, self.state
        for name in ("window", "lengths", "generated", "progress", "done", "limits"):
            getattr(state, name).copy_(getattr(own, name))
        state.sequences[:, : own.sequences.shape[1]] = own.sequences
        state.stop_ids.fill_(_NO_TOKEN)
        state.stop_ids[: own.stop_ids.shape[0]] = own.stop_ids
        if state.fill is not None and own.fill is not None:
            state.fill[:, : own.fill.shape[1]] = own.fill
        if self._pool is not None and call.pool is not None:
            self._pool.load(call.pool)
        if self._odds is not None and call.odds is not None:
            self._odds.load(call.odds)
        if self._lookup is not None and call.lookup is not None:
            self._lookup.starts.copy_(call.lookup.starts)
        self._call = copy.copy(call)
        self._call.state, self._call.pool, self._call.lookup = state, self._pool, self._lookup
        self._call.odds = self._odds
        return self._call

    def _run(self) -> torch.Tensor:
        """What is captured: [B, 4], the rows' report behind an iteration."""
        assert self._call is not None
        self._call.run(self._host)
        return self.state.report()

    def launch(self) -> None:
        """Start an iteration, and the transfer of its report."""
        assert self._captured is not None
        report, replay = self._captured
        replay()
        self._readback.start(report)

    @property
    def unread(self) -> int:
        """Iterations whose report was not taken."""
        return self._readback.unread

    def report(self) -> list[list[int]]:
        """That of the oldest such iteration, as `WindowState.report`, once it is there."""
        return self._readback.next()

    def leave(self, columns: int) -> WindowState:
        """Wait for all that was launched, and let go of the call.

        Returns:
            The state, with `columns` of its sequences in memory of their own.
        """
        text = self.state.sequences[:, :columns].clone()
        self._readback.settle()
        self._call = None
        return replace(self.state, sequences=text)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        tensors = [value for value in vars(self.state).values() if value is not None]
        sources = [kept.nbytes for kept in (self._pool, self._odds) if kept is not None]
        return sum(tensor.nbytes for tensor in tensors) + sum(sources)


def _stop_places(state: WindowState) -> int:
    return round_up(max(1, state.stop_ids.shape[0]), _STOP_IDS)


def iteration_key(
    kind: type,
    state: WindowState,
    config: JacobiConfig,
    *,
    verify: int | None,
    lookup: Lookup | None,
    pooled: bool,
    weighed: bool,
) -> tuple:
    """What is fixed in a captured iteration beside its forward.

    Args:
        kind: of the iteration; others: its attributes.
    """
    return (
        kind,
        round_up(state.sequences.shape[1], _COLUMNS),
        config.width,
        config.candidates,
        verify,
        config.mode,
        config.accept,
        None if lookup is None else (lookup.longest, lookup.least),
        pooled,
        weighed,
        state.fill is None,
        _stop_places(state),
    )


def static_iteration(forward: GraphedForward, call: WindowIteration) -> StaticIteration | None:
    """The capture of whole iterations like `call`, made where there is none yet.

    Returns:
        None where an iteration needs the host (logits processors, samples, recorded trajectories),
        so that its forwards are captured by themselves, or where the capture failed.
    """
    predictor, config = call.predictor, call.config
    if predictor.processors or predictor.noise is not None or config.record_trajectories:
        return None
    key = iteration_key(
        type(call),
        call.state,
        config,
        verify=call.verify,
        lookup=call.lookup,
        pooled=call.pool is not None,
        weighed=call.odds is not None,
    )
    forward.by_window = False
    if key not in forward.iterations:
        what = f"iteration over {list(call.state.window.shape)} tokens"
        made = forward.attempt(lambda: StaticIteration(call).captured(call, forward), what)
        if made is None and forward.automatic:
            return None  # who asks for a graph later is to try, and to hear of it
        forward.iterations[key] = made
        while len(forward.iterations) > MOST_KEPT:
            forward.iterations.popitem(last=False)
    forward.iterations.move_to_end(key)
    return forward.iterations[key]


class StaticLoop(DecodingLoop):
    """Runs the iterations of one call by replays.

    Args:
        static: captured for iterations like `call`.
        others: those of `DecodingLoop`.
    """

    def __init__(
        self, static: StaticIteration, call: WindowIteration, rules: StopRules, **others: Any
    ):
        self._columns = call.state.sequences.shape[1]
        super().__init__(static.enter(call), rules, **others)
        self._static = static
        # where the host decides or shows something between two iterations, it is waited for
        waits = rules.per_token or rules.per_iteration or self.streamer is not None
        self._ahead = 0 if waits or self.config.max_iterations is not None else 1

    def _iterate(self) -> None:
        self._static.launch()
        self.forwards += 1
        if self._static.unread > self._ahead:
            table = self._static.report()
            self._take(table, [len(table[0])])

    def _finish(self) -> None:
        self.state = self._static.leave(self._columns)


def graphed_loop(
    forward: GraphedForward, call: WindowIteration, rules: StopRules, **others: Any
) -> DecodingLoop:
    """The loop of a call with captures; its time counts what capturing took.

    Args:
        others: those of `DecodingLoop`.
    """
    started = time.perf_counter()
    static = static_iteration(forward, call)
    loop = (
        DecodingLoop(call, rules, **others)
        if static is None
        else StaticLoop(static, call, rules, **others)
    )
    loop.seconds = time.perf_counter() - started
    return loop
