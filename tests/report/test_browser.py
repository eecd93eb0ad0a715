"""The page in a real browser, opened from disk."""

from __future__ import annotations

import re
from html import unescape

import pytest
from matplotlib.image import imread

from cllm.report import build_grid, palette, write_html

from .browser import dump, needs_chromium, screenshot
from .test_html import HOSTILE, hostile

pytestmark = [needs_chromium, pytest.mark.timeout(300)]

DARK_FIXED, DARK_WRONG = "#2456d6", "#a62f33"


def attribute(document: str, name: str) -> str | None:
    found = re.search(rf'<html[^>]*\b{name}="([^"]*)"', document)
    return found and found.group(1)


def shown_text(document: str) -> str:
    inside = re.search(r'<p id="text"[^>]*>(.*?)</p>', document, re.S).group(1)
    return unescape(re.sub(r"<[^>]+>", "", inside))


def status(document: str) -> str:
    return re.search(r'<output id="status"[^>]*>([^<]*)<', document).group(1)


def share_of(picture, colour: str) -> float:
    wanted = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
    difference = abs((imread(picture)[:, :, :3] * 255).round() - wanted).max(axis=2)
    return float((difference <= 3).mean())


@pytest.fixture(scope="module")
def page(tmp_path_factory, math, long):
    return write_html([math, long], tmp_path_factory.mktemp("page") / "index.html")


def instrumented(page, script: str):
    """A copy of the page that runs `script` when it has loaded; only its own script is allowed in
    the original."""
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page.read_text("utf-8"))
    body = "setTimeout(() => { " + script + " }, 50);"
    copy = page.with_name("instrumented.html")
    copy.write_text(text.replace("</body>", f"<script>{body}</script></body>"), "utf-8")
    return copy


def test_it_opens_at_the_end(page, math):
    document = dump(page)
    assert attribute(document, "data-ready") == "true"
    assert attribute(document, "data-trajectory") == "0"
    total = len(math.iterations)
    assert attribute(document, "data-iteration") == str(total)
    assert document.count('role="gridcell"') == len(build_grid(math).cells)
    final = "".join(math.pieces[token] for token in math.tokens)
    assert shown_text(document).replace("⏎", "") == final


def test_the_fragment_moves_the_slider(page, math):
    document = dump(page, "#trajectory=0&iteration=5")
    row = build_grid(math).rows[5]
    assert attribute(document, "data-iteration") == "5"
    assert status(document) == (
        f"Iteration 5 of {len(math.iterations)}: {row.accepted} "
        f"token{'s' if row.accepted > 1 else ''} accepted, {row.committed} of 45 fixed"
    )
    text = [math.pieces[token] for token in math.tokens[: row.committed]]
    text += [math.pieces[cell.token] for cell in row.cells if cell.state != "fixed"]
    assert shown_text(document).replace("⏎", "") == "".join(text)
    paragraph = re.search(r'<p id="text"[^>]*>(.*?)</p>', document, re.S).group(1)
    for state in ("fixed", "wrong"):
        expected = row.committed if state == "fixed" else 0
        expected += sum(cell.state == state != "fixed" for cell in row.cells)
        assert len(re.findall(rf'<span class="{state}\b', paragraph)) == expected
    assert re.search(
        r'class="row current"[^>]*data-iteration="5"[^>]*aria-current="true"', document
    )


def test_the_fragment_chooses_the_trajectory_and_is_kept_in_range(page, long):
    document = dump(page, "#trajectory=1&iteration=0")
    assert attribute(document, "data-trajectory") == "1"
    assert status(document).startswith(f"Iteration 0 of {len(long.iterations)}: the initial guess")
    document = dump(page, "#trajectory=99&iteration=99999")
    assert attribute(document, "data-trajectory") == "1"
    assert attribute(document, "data-iteration") == str(len(long.iterations))
    document = dump(page, "#trajectory=x&iteration=-3")
    assert attribute(document, "data-trajectory") == "0"


@pytest.mark.parametrize("size", ["1280,1000", "420,1500"])
def test_blue_and_red_in_the_picture(page, tmp_path, size):
    picture = screenshot(page, tmp_path / "page.png", "#trajectory=0&iteration=8&theme=light", size)
    width, height = map(int, size.split(","))
    assert imread(picture).shape[:2] == (height, width)
    assert share_of(picture, palette.FIXED.fill) > 0.001
    assert share_of(picture, palette.WRONG.fill) > 0.005


def test_dark_theme(page, tmp_path):
    picture = screenshot(page, tmp_path / "dark.png", "#trajectory=0&iteration=8&theme=dark")
    assert share_of(picture, "#0f1420") > 0.2
    assert share_of(picture, DARK_FIXED) > 0.001
    assert share_of(picture, DARK_WRONG) > 0.005


def test_nothing_spills_over_a_narrow_window(page):
    copy = instrumented(
        page, "document.title = [document.documentElement.scrollWidth, innerWidth].join(' ');"
    )
    needed, given = map(int, re.search(r"<title>(\d+) (\d+)</title>", dump(copy)).groups())
    assert needed <= given
    needed, given = map(
        int, re.search(r"<title>(\d+) (\d+)</title>", dump(copy, size="500,900")).groups()
    )
    assert needed <= given


def test_hover_tells_about_the_token(page, math):
    grid = build_grid(math)
    cell = next(cell for cell in grid.cells if cell.stationary)
    number = next(row.iteration for row in grid.rows if cell in row.cells)
    chosen = f'.row[data-iteration="{number}"] .cell[data-position="{cell.position}"]'
    copy = instrumented(
        page,
        f"document.querySelector('{chosen}')"
        ".dispatchEvent(new MouseEvent('mouseover', { bubbles: true }));",
    )
    document = dump(copy)
    tooltip = re.search(r'<div id="tooltip"[^>]*>(.*?)</div>', document, re.S).group(0)
    assert "hidden" not in tooltip.split(">")[0]
    assert f"token {cell.token} at position {cell.position}" in tooltip
    assert f"becomes fixed in iteration {cell.fixed_at}" in tooltip
    assert "stationary" in tooltip


def test_keys_and_buttons(page):
    press = (
        "const press = (key, on = document.body) =>"
        " on.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));"
    )
    copy = instrumented(
        page,
        press + "press('Home'); press('ArrowRight'); press('ArrowRight'); press('ArrowLeft');"
        "document.getElementById('forward').click();"
        "const cell = document.querySelector('.row[data-iteration=\"4\"] .cell'); cell.focus();"
        "press('ArrowRight', cell); press('ArrowDown', document.activeElement);"
        "const at = document.activeElement;"
        "document.title = [document.documentElement.dataset.iteration, location.hash,"
        " at.parentElement.dataset.iteration, at.tabIndex,"
        " document.querySelectorAll('#grid [tabindex=\"0\"]').length].join(' ');",
    )
    title = unescape(re.search(r"<title>(.*?)</title>", dump(copy)).group(1))
    assert title == "2 #trajectory=0&iteration=2 5 0 1"


def test_play_runs_to_the_end_and_stops(page, math):
    copy = instrumented(page, "document.body.focus(); document.getElementById('play').click();")
    # 34 iterations at 600 ms: four seconds of the page's time show some of them, not all
    document = dump(copy)
    reached = int(attribute(document, "data-iteration"))
    assert 0 < reached < len(math.iterations)
    assert 'data-playing="true"' in document


def test_hostile_tokens_in_the_browser(tmp_path, sliding):
    page = write_html([hostile(sliding)], tmp_path / "hostile.html", title=HOSTILE[0])
    document = dump(page, "#iteration=1")
    assert attribute(document, "data-ready") == "true"
    assert document.count("<script") == 2
    labels = [
        unescape(label)
        for label in re.findall(r'role="gridcell"[^>]*aria-label="([^"]*)"', document)
    ]
    assert any(label.startswith(HOSTILE[0].replace(" ", "·")) for label in labels)
