"""The terminal's grid: it fits, it says what it cut, and it can be read without colour."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from cllm.report import ReportError, render_terminal

BLUE, RED = "48;2;29;78;216", "48;2;248;113;113"


def printed(trajectory, width: int, *, colour: bool = False, encoding: str = "utf-8", **options):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = Console(
        file=stream,
        width=width,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        legacy_windows=False,
    )
    console.print(render_terminal(trajectory, **options))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_by_hand(sliding):
    lines = printed(sliding, 100).splitlines()
    assert lines[0] == "5 tokens in 3 iterations: 1.67 tokens per forward"
    assert lines[1] == "2 fast-forwarded, 1 stationary; sliding mode, block size 4"
    grid = [line.rstrip() for line in lines[lines.index("") + 1 :]]
    assert [line.replace("\u00d7", "x") for line in grid] == [
        "  │ 0    1        2    3    4",
        "0 │x#90 x#91     =⏎",
        "1 │ ten =·eleven x#99 •·13",
        "2 │      ·eleven »⏎   =·13 x#98",
        "3 │                    ·13 »!",
    ]


def test_every_mark_is_in_the_legend(math):
    text = printed(math, 100).replace("\u00d7", "x")
    for meaning in (
        "   fixed",
        " »  fast-forwarded: ",
        " =  right, not known yet",
        " •  stationary: ",
        " x  not yet right",
    ):
        assert meaning in text


@pytest.mark.parametrize("width", [20, 33, 60, 80, 120, 300])
def test_no_line_is_wider_than_the_console(math, width):
    lines = printed(math, width, max_rows=1000).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    # every iteration is there, and every position has its column
    shown = {line.split("│")[0].strip() for line in lines if "│" in line}
    assert {str(number) for number in range(len(math.iterations) + 1)} <= shown
    columns = " ".join(line.split("│")[1] for line in lines if line.startswith("   │")).split()
    assert columns == [str(position) for position in range(len(math.tokens))]


def test_wide_characters_keep_the_columns(sliding):
    pieces = {**sliding.pieces, 10: "日本語日本語日本語", 99: "🦆"}
    for width in (24, 30, 100):
        lines = printed(replace(sliding, pieces=pieces), width).splitlines()
        assert all(cell_len(line) <= width for line in lines)
    first, second = (line for line in lines if line.startswith(("1 │", "2 │")))
    column = cell_len(first[: first.index("=·eleven")])
    assert cell_len(second[: second.index(" ·eleven")]) == column
    assert "…" in first


def test_long_generations_are_cut_and_say_so(long):
    text = printed(long, 80, max_rows=20)
    rows = [line for line in text.splitlines() if "│" in line and not line.startswith("    ")]
    assert len(rows) == 20
    last = text.splitlines()[-1]
    assert last.startswith("… cut here, ") and "tokens and" in last and "iterations" in last
    later = printed(long, 80, first=100, max_rows=20)
    header = next(line for line in later.splitlines() if "│" in line)
    assert header.split("│")[1].split()[0] == "100"


def test_colours(sliding):
    text = printed(sliding, 100, colour=True)
    assert BLUE in text and RED in text


def test_ascii_console(sliding):
    text = printed(sliding, 100, encoding="ascii")
    assert "1 | ten =_eleven x#99 o_13" in text
    assert "2 |      _eleven >\\n" in text


def test_bad_arguments(sliding):
    with pytest.raises(ValueError, match="first is 5, but the text has the positions 0 to 4"):
        render_terminal(sliding, first=5)
    with pytest.raises(ValueError, match="max_rows is 0"):
        render_terminal(sliding, max_rows=0)
    with pytest.raises(ReportError, match="no tokens"):
        render_terminal(replace(sliding, tokens=[]))
