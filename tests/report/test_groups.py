"""Trajectories of one prompt beside each other, in every form of the report."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cllm import trajectory as trajectory_files
from cllm.report import grouped, write_html, write_png, write_report

from .browser import dump, needs_chromium
from .simulator import spoken
from .test_browser import attribute, instrumented, status
from .test_html import HOSTILE, Page

TEXT = "one two three four five six"


@pytest.fixture(scope="module")
def pair():
    """The same text, decoded with small and with large windows."""
    return [
        spoken(TEXT, block_size=size, prompt_text="count") for size in (2, 8)
    ]  # fmt: skip


@pytest.fixture
def titled(pair):
    return [replace(one, title=title) for one, title in zip(pair, ("base", "adapter"), strict=True)]


def test_who_stands_together(titled, sliding, block):
    base, adapter = titled
    plain = replace(base, title=None)
    other = replace(adapter, prompt=[*adapter.prompt, 1])
    assert grouped([base, adapter]) == [[base, adapter]]
    assert grouped([base, adapter, base, adapter]) == [[base, adapter]] * 2
    assert grouped([base, other]) == [[base], [other]]
    assert grouped([plain, adapter, plain]) == [[plain], [adapter], [plain]]
    assert grouped([plain, plain]) == [[plain], [plain]]
    assert grouped([]) == []


def test_titles_are_kept_on_disk(tmp_path, titled, sliding):
    path = trajectory_files.save(tmp_path / "x.jsonl", [*titled, sliding])
    assert trajectory_files.load(path) == [*titled, sliding]
    assert '"title"' not in path.read_text().splitlines()[2]


def test_one_picture_a_prompt(tmp_path, titled, sliding):
    paths = write_report([*titled, sliding], tmp_path)
    assert [path.name for path in paths[2:]] == ["trajectory-001.png", "trajectory-002.png"]
    same = write_png(titled, tmp_path / "same.png", titles=["base", "adapter"])
    assert paths[2].read_bytes() == same.read_bytes()
    assert len(trajectory_files.load(paths[1])) == 3


def test_page_without_javascript(tmp_path, titled, sliding):
    page = Page(write_html([*titled, sliding], tmp_path / "x.html").read_text("utf-8"))
    assert [(entry["group"], entry["title"]) for entry in page.data] == [
        (0, "base"),
        (0, "adapter"),
        (1, None),
    ]
    options = [attributes for tag, attributes in page.elements if tag == "option"]
    assert [option["value"] for option in options] == ["0", "1"]
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert links == ["#trajectory=0", "#trajectory=0", "#trajectory=1"]
    text = " ".join(part.strip() for part in page.text if part.strip())
    counts = [(len(one.tokens), len(one.iterations)) for one in titled]
    for title, (tokens, iterations) in zip(("base", "adapter"), counts, strict=True):
        assert f"1. count {title} {tokens} {iterations} " in text
        assert f"All 1 {title} {tokens} {iterations} " in text


def test_hostile_title_stays_text(tmp_path, titled):
    evil = [replace(one, title="".join(HOSTILE) + one.title) for one in titled]
    page = Page(write_html(evil, tmp_path / "x.html").read_text("utf-8"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "b" not in tags
    assert page.data[1]["title"] == evil[1].title.replace("\ud800", "\ufffd")


@needs_chromium
@pytest.mark.timeout(300)
def test_one_slider_moves_both(tmp_path, titled, sliding):
    page = write_html([*titled, sliding], tmp_path / "x.html")
    base, adapter = (len(one.iterations) for one in titled)
    assert adapter < base
    document = dump(page, f"#trajectory=0&iteration={adapter}")
    assert attribute(document, "data-ready") == "true"
    assert status(document) == f"Iteration {adapter} of {base}"
    counts = re.findall(r'<span class="count">([^<]*)</span>', document)
    assert counts[:4] == [
        f"{base} iterations",
        f"{adapter} iterations",
        f"iteration {adapter} of {base}",
        f"done in {adapter} iterations",
    ]
    tokens = len(titled[0].tokens)
    assert counts[5].endswith(f"{tokens} of {tokens} fixed")
    assert not counts[4].endswith(f"{tokens} of {tokens} fixed")
    assert document.count('role="grid"') == 2 and 'id="grid-2"' in document
    document = dump(page, "#trajectory=1")
    assert document.count('role="grid"') == 1 and status(document).startswith("Iteration 3 of 3: ")


@needs_chromium
@pytest.mark.timeout(300)
def test_keys_and_hover_stay_in_their_own_grid(tmp_path, titled):
    page = write_html(titled, tmp_path / "x.html")
    copy = instrumented(
        page,
        "const cell = document.querySelector('#grid-2 .row[data-iteration=\"1\"] .cell');"
        "cell.focus();"
        "cell.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowDown', bubbles: true }));"
        "const at = document.activeElement;"
        "at.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', bubbles: true }));"
        "document.title = [at.closest('.grid').id, at.parentElement.dataset.iteration,"
        " document.documentElement.dataset.iteration,"
        " document.querySelectorAll('#text-2 .linked').length,"
        " document.querySelectorAll('#text .linked').length,"
        " document.querySelectorAll('.grid [tabindex=\"0\"]').length].join(' ');",
    )
    assert re.search(r"<title>(.*?)</title>", dump(copy)).group(1) == "grid-2 2 2 1 0 2"


@needs_chromium
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", ["1280,1000", "500,900"])
def test_nothing_spills_over(tmp_path, titled, size):
    page = write_html(titled, tmp_path / "x.html")
    copy = instrumented(
        page,
        "const [left, right] = [...document.querySelectorAll('.lane .scroller')]"
        ".map((node) => node.getBoundingClientRect());"
        "document.title = [document.documentElement.scrollWidth, innerWidth,"
        " left.right <= right.left, left.bottom <= right.top].join(' ');",
    )
    found = re.search(r"<title>(.*?)</title>", dump(copy, size=size)).group(1).split()
    assert int(found[0]) <= int(found[1])
    # beside each other where there is room, below each other where there is not
    assert found[2:] == (["true", "false"] if size == "1280,1000" else ["false", "true"])
