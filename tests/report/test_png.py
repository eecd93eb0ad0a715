"""The picture opens, is not blank, carries the colours, and is quiet about odd text."""

from __future__ import annotations

import warnings
from dataclasses import replace

import matplotlib
import pytest
from matplotlib.image import imread

from cllm.report import ReportError, palette, write_png
from cllm.report.fonts import drawable, families


def pixels(path):
    """The picture as [height, width, 3] integers, 0 to 255."""
    return (imread(path)[:, :, :3] * 255).round().astype(int)


def share_of(picture, colour: str) -> float:
    wanted = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
    return float((abs(picture - wanted).max(axis=2) <= 2).mean())


def dark_share(picture) -> float:
    return float((picture.max(axis=2) < 90).mean())


def test_colours_and_text(tmp_path, math):
    path = write_png(math, tmp_path / "deep" / "math.png")
    assert path == tmp_path / "deep" / "math.png"
    picture = pixels(path)
    height, width, _ = picture.shape
    # 150 dots an inch: a head of 1.5, a foot of 0.35, and 0.19 inches a row
    assert height == pytest.approx(150 * (1.85 + 0.19 * (len(math.iterations) + 1)), abs=1)
    assert 1500 < width < 4000
    for colour in (palette.FIXED.fill, palette.RIGHT.fill, palette.WRONG.fill):
        assert share_of(picture, colour) > 0.002
    assert share_of(picture, palette.FAST_FORWARDED) > 0.0001
    assert share_of(picture, "#ffffff") > 0.3
    # the same grid without token texts has less ink in its cells
    unnamed = write_png(
        replace(math, pieces=dict.fromkeys(math.pieces, ".")), tmp_path / "dots.png"
    )
    assert dark_share(picture) > dark_share(pixels(unnamed))


def test_size_follows_the_grid(tmp_path, sliding, long):
    small = pixels(write_png(sliding, tmp_path / "small.png")).shape
    assert small[1] == 1350 and small[0] < 450
    height, width, _ = pixels(write_png(long, tmp_path / "long.png")).shape
    assert 2000 < width < 4100 and 500 < height < 9000
    picture = pixels(tmp_path / "long.png")
    assert share_of(picture, palette.FIXED.fill) > 0.0005
    assert share_of(picture, palette.WRONG.fill) > 0.002


def test_two_hundred_fifty_six_tokens_in_two_hundred_iterations_stay_in_bounds(tmp_path):
    from .simulator import simulate, toy_next_token

    trajectory = simulate(toy_next_token(4, 3, 1), [1], 256, 32, mode="block")
    height, width, _ = pixels(write_png(trajectory, tmp_path / "big.png")).shape
    assert width < 4100 and height < 9100


ODD = ["$x^2$", "日本", "\U00013080", "</b>", "\ud800", "\n", "_{", "مرحبا", "🦆", "e\u0301"]


def test_odd_text_neither_warns_nor_crashes(tmp_path, sliding):
    pieces = dict(zip([*sliding.pieces, 90, 91, 96, 97, 98], ODD, strict=True))
    trajectory = replace(sliding, pieces=pieces, prompt_text="".join(ODD[:4]) + "$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_png(trajectory, tmp_path / "odd.png").stat().st_size > 1000


def test_missing_glyphs_become_boxes():
    assert drawable("a⏎·\U0010ffff") == "a⏎·□"
    assert families()[:2] == ("DejaVu Sans Mono", "DejaVu Sans")


def test_the_callers_matplotlib_settings_are_neither_used_nor_changed(tmp_path, sliding):
    plain = write_png(sliding, tmp_path / "plain.png").read_bytes()
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.usetex": True, "savefig.bbox": "tight", "figure.dpi": 7}):
        assert write_png(sliding, tmp_path / "again.png").read_bytes() == plain
    assert dict(matplotlib.rcParams) == before


def test_an_empty_trajectory_leaves_no_file(tmp_path, sliding):
    with pytest.raises(ReportError):
        write_png(replace(sliding, iterations=[]), tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_several_side_by_side(tmp_path, sliding, long):
    both = pixels(write_png([sliding, long], tmp_path / "both.png", titles=["before", "after"]))
    alone = [pixels(write_png(one, tmp_path / "one.png")).shape for one in (sliding, long)]
    assert both.shape[1] >= 2 * 1350 and both.shape[0] <= max(shape[0] for shape in alone)
    half = both.shape[1] // 2
    for side in (both[:, :half], both[:, half:]):
        assert share_of(side, palette.FIXED.fill) > 0.0005
    assert (tmp_path / "both.png").read_bytes() != write_png(
        [sliding, long], tmp_path / "other.png", titles=["before", "behind"]
    ).read_bytes()
    for wrong in (([], None), ([sliding], ["one", "two"])):
        with pytest.raises(ReportError, match="one title for each"):
            write_png(wrong[0], tmp_path / "none.png", titles=wrong[1])
    assert not (tmp_path / "none.png").exists()
