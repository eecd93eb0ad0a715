"""What a run looks like: two panels side by side in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..prompts import Prompt
from .measure import SIDES, PromptResult, Side

Decode = Callable[[list[int]], str]

_TITLES: dict[Side, str] = {"autoregressive": "one token at a time", "jacobi": "Jacobi"}
_COLOURS: dict[Side, str] = {"autoregressive": "yellow", "jacobi": "bright_blue"}
_NEW = "bold black on bright_green"
# between two frames; drawing is off the clock, this only keeps the run from taking longer
_FRAME_SECONDS = 0.08
_BODY_LINES = 14


@dataclass
class _Pane:
    """One side of the screen."""

    text: str = ""
    new: str = ""
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    state: str = "waiting"
    ids: list[int] = field(default_factory=list)
    unseen: int = 0


class LiveView:
    """Draws both sides while they decode; what came in with the last forward is highlighted.

    Args:
        console: a terminal.
        decode: token ids to text.
        heading: what is being run, for the top line.
        block_size: n of the Jacobi side.
        adapter: what to say of the adapter that makes its guesses; None where there is none.
    """

    def __init__(
        self,
        console: Console,
        decode: Decode,
        heading: str,
        block_size: int,
        adapter: str | None = None,
    ) -> None:
        self._adapter = adapter
        self._console = console
        self._decode = decode
        self._heading = heading
        self._block_size = block_size
        self._panes: dict[Side, _Pane] = {side: _Pane() for side in SIDES}
        self._prompt: tuple[int, int, Prompt] | None = None
        self._results: list[PromptResult] = []
        self._drawn = 0.0
        self._live = Live(
            console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def prompt(self, number: int, total: int, prompt: Prompt) -> None:
        """See `View`."""
        self._prompt = (number, total, prompt)
        self._panes = {side: _Pane() for side in SIDES}
        self._draw()

    def tokens(self, side: Side, ids: list[int], new: int, steps: int, seconds: float) -> None:
        """See `View`."""
        pane = self._panes[side]
        pane.ids, pane.tokens, pane.forwards, pane.seconds = ids, len(ids), steps, seconds
        pane.state = "running"
        pane.unseen = max(pane.unseen, new)
        other = self._panes[SIDES[1 - SIDES.index(side)]]
        if other.state == "running":
            other.state = "done"
            self._settle(other)
        if time.monotonic() - self._drawn < _FRAME_SECONDS:
            return
        # the longest run since the last frame ends where the text ends now, or is shown as if
        self._spell(pane, new)
        self._draw()

    def finished(self, result: PromptResult) -> None:
        """See `View`."""
        self._results.append(result)
        for side in SIDES:
            pane, done = self._panes[side], getattr(result, side)
            pane.ids, pane.tokens, pane.seconds = done.ids, len(done.ids), done.seconds
            pane.forwards, pane.state = done.forwards, "done"
            self._settle(pane)
        self._draw()

    def _spell(self, pane: _Pane, new: int) -> None:
        before, whole = self._decode(pane.ids[:-new]), self._decode(pane.ids)
        if whole.startswith(before):
            pane.text, pane.new = before, whole[len(before) :]
        else:
            # a character in several tokens: its first bytes decode to something else
            pane.text, pane.new = whole, ""

    def _settle(self, pane: _Pane) -> None:
        pane.text, pane.new = self._decode(pane.ids), ""

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._live.update(self._frame(), refresh=True)

    def _frame(self) -> RenderableType:
        width = self._console.width
        grid = Table.grid(expand=True, padding=0)
        for _ in SIDES:
            grid.add_column(ratio=1)
        lines = min(_BODY_LINES, max(4, self._console.height - 11))
        grid.add_row(*(self._panel(side, (width // 2) - 4, lines) for side in SIDES))
        parts: list[RenderableType] = [Text(self._heading, style="bold", no_wrap=True)]
        if self._adapter is not None:
            parts.append(
                Text(self._adapter, style="bright_blue", no_wrap=True, overflow="ellipsis")
            )
        if self._prompt is not None:
            number, total, prompt = self._prompt
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append(f"prompt {number} of {total}  ", style="bold")
            line.append(f"{prompt.id}  ", style="cyan")
            line.append(" ".join(prompt.text.split()), style="dim")
            parts.append(line)
        return Group(*parts, grid, self._tally())

    def _panel(self, side: Side, width: int, lines: int) -> Panel:
        pane, colour = self._panes[side], _COLOURS[side]
        title = _TITLES[side]
        if side == "jacobi":
            with_adapter = " with adapter" if self._adapter is not None else ""
            title += f"{with_adapter}, n = {self._block_size}"
        body = Text(pane.text.replace("\t", "    "))
        body.append(pane.new, style=_NEW)
        if pane.state == "running":
            body.append("\u258c", style=colour)
        wrapped = list(body.wrap(self._console, max(width, 8), tab_size=4))[-lines:]
        wrapped += [Text()] * (lines - len(wrapped))
        footer = Text("waiting", style="dim")
        if pane.state != "waiting":
            rate = pane.tokens / pane.seconds if pane.seconds else 0.0
            footer = Text()
            footer.append(f"{pane.tokens} tokens", style="bold")
            footer.append(f" in {pane.forwards} forwards, ")
            footer.append(f"{rate:.1f}/s", style="bold")
        return Panel(
            Group(*wrapped),
            title=Text(title, style=f"bold {colour}"),
            subtitle=footer,
            border_style=colour if pane.state == "running" else "dim",
        )

    def _tally(self) -> Text:
        if not self._results:
            legend = Text(" ")
            legend.append(" accepted by the last forward ", style=_NEW)
            return legend
        totals = Totals(self._results)
        same = sum(result.identical for result in self._results)
        line = Text(" so far: ", no_wrap=True, overflow="ellipsis")
        line.append(f"{totals.tokens_per_forward:.2f} tokens per forward", style="bold")
        line.append(f", {totals.speedup:.2f}x the tokens/s, ")
        style = "green" if same == len(self._results) else "red"
        line.append(f"identical {same} of {len(self._results)}", style=style)
        return line


class PlainView:
    """One line a prompt on `console`: for pipes, logs and ``--json``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._counter = ""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def prompt(self, number: int, total: int, prompt: Prompt) -> None:
        """See `View`."""
        self._counter = f"{number}/{total}"

    def tokens(self, side: Side, ids: list[int], new: int, steps: int, seconds: float) -> None:
        """See `View`; a line per token would be noise."""

    def finished(self, result: PromptResult) -> None:
        """See `View`."""
        line = (
            f"{self._counter} {result.prompt.id}: {len(result.jacobi.ids)} tokens, "
            f"{result.tokens_per_forward:.2f} per forward, {result.speedup:.2f}x, "
            f"{'identical' if result.identical else 'NOT identical'}"
        )
        self._console.print(line, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Totals:
    """All prompts of a run together."""

    results: list[PromptResult]

    def tokens(self, side: Side) -> int:
        """Tokens that `side` generated."""
        return sum(len(getattr(result, side).ids) for result in self.results)

    def seconds(self, side: Side) -> float:
        """Seconds that `side` took."""
        return sum(getattr(result, side).seconds for result in self.results)

    def tokens_per_second(self, side: Side) -> float:
        """Tokens of all prompts over the seconds of all prompts."""
        return self.tokens(side) / self.seconds(side)

    @property
    def forwards(self) -> int:
        return sum(result.jacobi.forwards for result in self.results)

    @property
    def plain_forwards(self) -> int | None:
        """Forwards of Jacobi decoding without the adapter; None unless all prompts have them."""
        plain = [result.plain for result in self.results if result.plain is not None]
        if len(plain) != len(self.results):
            return None
        return sum(len(trajectory.iterations) for trajectory in plain)

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens("jacobi") / max(self.forwards, 1)

    @property
    def speedup(self) -> float:
        return self.tokens_per_second("jacobi") / self.tokens_per_second("autoregressive")

    @property
    def identical(self) -> bool:
        return all(result.identical for result in self.results)


def results_table(results: list[PromptResult], adapter: bool = False) -> Table:
    """One row a prompt and one for the total.

    Args:
        adapter: an adapter made the guesses. The column of iterations then gives the forwards of
            one-token decoding, of plain Jacobi decoding where it was run, and with the adapter.
    """
    totals = Totals(results)
    # everything fits 80 columns
    table = Table(
        show_footer=len(results) > 1,
        header_style="bold",
        footer_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    yes = Text("yes", style="green")
    no = Text("no", style="bold red")
    forwards = "itera-\ntions"
    if adapter:
        plain = "\nplain Jacobi /" if totals.plain_forwards is not None else ""
        forwards = f"forwards:\none-token /{plain}\nwith adapter"
    jacobi = "adapter" if adapter else "Jacobi"
    # one-token decoding has as many forwards as tokens, which leaves the column of three its room
    tokens = [] if adapter else [("tokens", str(totals.tokens("jacobi")))]
    columns: list[tuple[str, str]] = [
        ("prompt", "total"),
        *tokens,
        ("one-token\ntokens/s", f"{totals.tokens_per_second('autoregressive'):.1f}"),
        (f"{jacobi}\ntokens/s", f"{totals.tokens_per_second('jacobi'):.1f}"),
        (forwards, _forwards(results, adapter)),
        ("tokens/\nforward", f"{totals.tokens_per_forward:.2f}"),
        ("speedup", f"{totals.speedup:.2f}x"),
    ]
    for index, (header, footer) in enumerate(columns):
        table.add_column(header, footer, justify="left" if index == 0 else "right")
    table.add_column("identical" if not adapter else "same\ntext", yes if totals.identical else no,
                     justify="right")  # fmt: skip
    for result in results:
        table.add_row(
            Text(result.prompt.id, overflow="ellipsis", no_wrap=True),
            *([] if adapter else [str(len(result.jacobi.ids))]),
            f"{result.autoregressive.tokens_per_second:.1f}",
            f"{result.jacobi.tokens_per_second:.1f}",
            _forwards([result], adapter),
            f"{result.tokens_per_forward:.2f}",
            f"{result.speedup:.2f}x",
            yes if result.identical else no,
        )
    return table


def _forwards(results: list[PromptResult], adapter: bool) -> str:
    totals = Totals(results)
    if not adapter:
        return str(totals.forwards)
    counts = [sum(result.autoregressive.forwards for result in results), totals.forwards]
    if totals.plain_forwards is not None:
        counts.insert(1, totals.plain_forwards)
    return " / ".join(map(str, counts))
