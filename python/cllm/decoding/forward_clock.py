"""How long one forward of decoding takes, by its rows: `ForwardClock`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

import cllm_kernels

from ..adapter import Gate, GatedAdapter
from .automatic import obstacle
from .cache import VIEW_STEP, round_up
from .config import Compile
from .forward import BlockForward
from .graphs import GraphedForward, on_device
from .layouts import Layout, choose_layout
from .support import check_model, model_device


class ForwardClock:
    """A prompt in the cache, and forwards of any width behind it, against the clock.

    The prompt is read once, not once a width. A forward is the model's with its masks, the argmax
    of every row, and its transfer to the host, as in an iteration of decoding; what an iteration
    does beside it takes a few launches of small kernels. Of captured forwards the device's time
    counts, as the host launches the next one meanwhile.

    Args:
        model: a transformers causal language model in eval mode.
        prompt: token ids [P], P >= 1.
        room: tokens that the cache must have room for behind the prompt, the largest window
            included: attention's time depends on it.
        adapter: of gated forwards.
        batch: rows, which all hold the prompt.
        compile: of the calls whose forwards these stand for, see `JacobiConfig`; None: from the
            second call of a shape on.

    Raises:
        UnsupportedModelError, AdapterError: as `cllm.generate`.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        prompt: Sequence[int],
        room: int,
        adapter: GatedAdapter | None = None,
        batch: int = 1,
        compile: Compile | None = "off",
    ):
        self._model = model
        self._compile = compile
        self._adapter = adapter
        traits = check_model(model)
        ids = torch.tensor([list(prompt)] * batch, device=model_device(model))
        self._tokens = ids
        self._lengths = torch.full((batch,), ids.shape[1] - 1, device=ids.device)
        self._room = room
        self._traits = traits
        self._forwards: dict[tuple[bool, Layout], BlockForward] = {}

    @torch.no_grad()
    def prepare(self, rows: int, gated: bool) -> tuple[BlockForward, Layout]:
        """What drives forwards over windows of `rows`, with the prompt in its cache; the first
        such forward would read the prompt otherwise, which counts in no time but in memory."""
        batch, length = self._tokens.shape
        layout = choose_layout(
            self._model, self._traits, self._tokens[0], batch * rows, gated=gated
        )
        forward = self._forwards.get((gated, layout))
        if forward is None:
            forward = self._forwards[gated, layout] = self._made(batch, length, layout)
            with layout.applied(self._model):
                if length > 1:
                    forward.prefill(self._tokens[:, :-1], self._lengths)
        return forward, layout

    def _made(self, batch: int, length: int, layout: Layout) -> BlockForward:
        device = self._tokens.device
        shape: dict[str, Any] = dict(
            batch=batch, slots=length + self._room, device=device,
            position_limit=self._traits.context, layout=layout,
        )  # fmt: skip
        without = self._compile == "off" or (
            self._compile is None and obstacle(self._model, device, layout) is not None
        )
        if without:
            return BlockForward(self._model, self._traits, **shape)
        shape["slots"] = round_up(shape["slots"], VIEW_STEP)
        forward = GraphedForward(self._model, self._traits, **shape)
        forward.automatic = True  # the call itself tells where it fails
        forward.by_prefill = False  # there is one
        forward.most_windows = sys.maxsize  # widths take turns, and all go with the clock
        return forward

    def plain(self, rows: int, forwards: int) -> float:
        """Seconds of a forward over a window of `rows` tokens, the mean of so many."""
        return self._run(rows, None, forwards)

    def gated(self, verify: int, block_size: int, forwards: int, *, adapter: bool = True) -> float:
        """Seconds of a forward over `verify` + `block_size` rows, the mean of so many.

        Args:
            adapter: False: without the adapter, to see what the window that stands twice costs.

        Raises:
            ValueError: there is no adapter.
        """
        if self._adapter is None:
            raise ValueError("a gated forward needs an adapter; pass one to ForwardClock")
        return self._run(block_size, verify, forwards, adapter)

    @torch.no_grad()
    def _run(self, width: int, verify: int | None, forwards: int, adapter: bool = False) -> float:
        forward, layout = self.prepare(width + (verify or 0), verify is not None)
        columns = torch.arange(width, device=self._tokens.device) % self._tokens.shape[1]
        window = self._tokens[:, columns].contiguous()
        host_lengths = self._lengths.tolist()
        with ExitStack() as stack:
            stack.enter_context(on_device(self._tokens.device))
            stack.enter_context(layout.applied(self._model))
            gate = Gate()
            if adapter and self._adapter is not None:
                gate = stack.enter_context(self._adapter.applied(self._model))

            def once() -> torch.Tensor:
                if verify is None:
                    logits = forward.window(window, self._lengths, host_lengths)
                else:
                    with gate.open(verify, window.shape[0], verify + width):
                        logits = forward.gated_window(window, verify, self._lengths, host_lengths)
                return cllm_kernels.row_argmax(logits)[0]

            if isinstance(forward, GraphedForward):
                forward.by_window = verify is None or adapter  # a capture has the adapter in it
                once()  # captures
                if window.is_cuda:
                    return _device_seconds(once, forwards)
            started = time.perf_counter()
            for _ in range(forwards):
                once().tolist()
            return (time.perf_counter() - started) / forwards


def _device_seconds(run: Callable[[], Any], times: int) -> float:
    """Seconds of the device for one `run`, the mean of so many."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / times
