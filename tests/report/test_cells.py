"""What a cell means: worked by hand, then as properties of simulated decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.report import ReportError, build_grid
from cllm.report.text import encodable, shorten, visible
from cllm.trajectory import Iteration, Trajectory

from .simulator import one_by_one, simulate, toy_next_token


def drawn(grid) -> list[str]:
    """Each row as one letter a cell, capitals marked, empty columns as dots."""
    lines = []
    for row in grid.rows:
        letters = ["."] * grid.columns
        for cell in row.cells:
            letter = {"fixed": "f", "right": "r", "wrong": "w"}[cell.state]
            marked = cell.fast_forwarded or cell.stationary
            letters[cell.position] = letter.upper() if marked else letter
        lines.append("".join(letters))
    return lines


def test_sliding_by_hand(sliding):
    grid = build_grid(sliding)
    # the initial guess: 90 and 91 are wrong for positions 0 and 1, 12 is right for position 2
    assert drawn(grid) == ["wwr..", "frwR.", ".fFrw", "...fF"]
    assert grid.fixed_at == (1, 2, 2, 3, 3)
    assert [row.committed for row in grid.rows] == [0, 1, 3, 5]
    assert [row.accepted for row in grid.rows] == [0, 1, 2, 2]
    totals = grid.totals
    assert (totals.tokens, totals.iterations, totals.block_size) == (5, 3, 4)
    assert (totals.fast_forwarded, totals.stationary, totals.mode) == (2, 1, "sliding")
    assert totals.tokens_per_forward == pytest.approx(5 / 3)


def test_cells_carry_what_stands_in_them(sliding):
    rows = build_grid(sliding).rows
    wrong = rows[1].at(2)
    assert (wrong.token, wrong.piece, wrong.state, wrong.fixed_at) == (99, "#99", "wrong", 2)
    newline = rows[2].at(2)
    assert (newline.piece, newline.fast_forwarded, newline.fixed_at) == ("⏎", True, 2)
    assert rows[1].at(1).piece == "·eleven"
    assert rows[1].at(4) is None and rows[2].at(0) is None


def test_block_by_hand(block):
    grid = build_grid(block)
    # a block keeps its place, its final tokens stay in the window; 22 was right, then lost again
    assert drawn(grid) == ["ww...", "fwr..", "ffw..", "fff..", "...fF"]
    assert grid.fixed_at == (1, 2, 3, 4, 4)
    assert grid.totals.stationary == 0
    assert [row.fast_forwarded for row in grid.rows] == [0, 0, 0, 0, 1]


def test_window_of_one_has_an_empty_guess():
    trajectory = simulate(toy_next_token(3, 5, 2), [1], 4, 1)
    assert drawn(build_grid(trajectory)) == ["....", "f...", ".f..", "..f.", "...f"]


def test_rows_touching(sliding):
    grid = build_grid(sliding)
    assert [row.iteration for row in grid.rows_touching(0, 1)] == [0, 1]
    assert [row.iteration for row in grid.rows_touching(3, 5)] == [1, 2, 3]


def test_a_final_token_keeps_its_place_when_a_later_pass_rounds_differently(block):
    iterations = list(block.iterations)
    iterations[2] = replace(iterations[2], predictions=[77, 21, 22])
    assert drawn(build_grid(replace(block, iterations=iterations)))[3] == "fff.."


@st.composite
def decodings(draw):
    vocabulary = draw(st.integers(2, 7))
    next_token = toy_next_token(draw(st.integers(0, 10**6)), vocabulary, draw(st.integers(0, 3)))
    prompt = draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=3))
    limit, block_size = draw(st.integers(1, 30)), draw(st.integers(1, 9))
    stops = draw(st.lists(st.integers(0, vocabulary - 1), max_size=1))
    offset = draw(st.integers(0, 6))
    trajectory = simulate(
        next_token,
        prompt,
        limit,
        block_size,
        mode=draw(st.sampled_from(["sliding", "block"])),
        accept=draw(st.sampled_from(["all", "one"])),
        stops=stops,
        fill=lambda index: (index + offset) % vocabulary,
    )
    return trajectory, one_by_one(next_token, prompt, limit, stops)


@given(decodings())
def test_every_token_becomes_fixed_once_and_stays(case):
    trajectory, expected = case
    grid = build_grid(trajectory)
    assert list(grid.tokens) == expected
    assert sum(row.accepted for row in grid.rows) == len(expected)
    for position, token in enumerate(expected):
        first = None
        for row in grid.rows:
            cell = row.at(position)
            if cell is None:
                assert row.position > position or row.end <= position
                continue
            assert cell.fixed_at == grid.fixed_at[position]
            assert (cell.state == "fixed") == (row.iteration >= cell.fixed_at)
            assert (cell.token == token) == (cell.state != "wrong")
            if cell.state == "fixed" and first is None:
                first = row.iteration
        assert first == grid.fixed_at[position]


@given(decodings())
def test_marks_agree_with_their_definitions(case):
    trajectory, expected = case
    grid = build_grid(trajectory)
    assert [row.fast_forwarded for row in grid.rows[1:]] == trajectory.fast_forwarded
    assert [row.stationary for row in grid.rows[1:]] == trajectory.stationary
    useful = sum(iteration.accepted > 0 for iteration in trajectory.iterations)
    assert grid.totals.fast_forwarded == len(expected) - useful
    for row in grid.rows:
        for cell in row.cells:
            later = [other.at(cell.position) for other in grid.rows[row.iteration :]]
            stationary = (
                row.iteration > 0
                and cell.state == "right"
                and any(
                    earlier.state == "wrong"
                    for earlier in row.cells
                    if earlier.position < cell.position
                )
                and all(other is None or other.state != "wrong" for other in later)
            )
            assert cell.stationary == stationary


def empty_of(trajectory: Trajectory, **changes) -> Trajectory:
    return replace(trajectory, **changes)


def test_errors_name_what_is_missing_or_damaged(sliding):
    with pytest.raises(ReportError, match="no iterations: record it with record_trajectories"):
        build_grid(empty_of(sliding, iterations=[]))
    with pytest.raises(ReportError, match="no tokens"):
        build_grid(empty_of(sliding, tokens=[]))
    with pytest.raises(ReportError, match=r"accept 3 tokens, but the trajectory has 5"):
        build_grid(empty_of(sliding, iterations=sliding.iterations[:2]))
    with pytest.raises(ReportError, match="iteration 2 accepted 2 tokens from position 1"):
        build_grid(empty_of(sliding, tokens=[10, 11, 50, 13, 14]))
    gap = Iteration(4, [0, 0], [11, 12], exact=2, accepted=2)
    with pytest.raises(ReportError, match="iteration 2 starts at token 4, but 1 tokens"):
        build_grid(empty_of(sliding, iterations=[sliding.iterations[0], gap]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a b", "·a·b"),
        ("\n\t\r", "⏎⇥␍"),
        ("\x00\x1b\x7f", "␀␛␡"),
        ("", "∅"),
        ("\u2028x\u200b", "<U+2028>x<U+200B>"),
        ("\u202eabc", "<U+202E>abc"),
        ("\x85\xa0", "<U+0085><U+00A0>"),
        ("\u0301", "◌\u0301"),
        ("\ud800", "\ufffd"),
        ("日本🦆", "日本🦆"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


@given(st.text(st.characters(exclude_categories=[])))
def test_visible_is_one_encodable_line(text):
    shown = visible(text)
    assert shown and shown.splitlines() == [shown]
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert encodable(shown) == shown


def test_shorten():
    assert shorten("a  b\nc", 10) == "a b c"
    assert shorten("abcdefgh", 5) == "abcd…"
