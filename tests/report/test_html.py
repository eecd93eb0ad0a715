"""The page as a file: whole, self-contained, and safe whatever the model wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm import trajectory as trajectory_files
from cllm.report import ReportError, build_grid, render_html, write_html, write_report
from cllm.report.text import encodable

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--",
    "<b onmouseover=\"alert('x')\">",
    "\u2028\u2029",
    "&lt;&amp;",
    "'\"\\",
    "{{ 7 * 7 }}{% raw %}",
    "\ud800",
    "\x00",
    "]]>",
]


class Page(HTMLParser):
    """Collects elements, and the text of scripts, styles and everything else."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag in ("script", "style"):
            getattr(self, f"{tag}s").append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("script", "style"):
            getattr(self, f"{self._inside}s")[-1] += data
        else:
            self.text.append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])


def hostile(sliding):
    tokens = [*sliding.pieces, 90, 91, 96, 97, 98]
    return replace(
        sliding,
        pieces=dict(zip(tokens, HOSTILE, strict=True)),
        prompt_text="".join(HOSTILE),
    )


def test_hostile_text_stays_text(tmp_path, sliding):
    title = "<img src=x onerror=alert(1)> & co"
    page = Page(write_html([hostile(sliding)], tmp_path / "x.html", title=title).read_text("utf-8"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags and "b" not in tags
    assert page.data[0]["prompt"] == encodable("".join(HOSTILE))
    assert page.data[0]["text"]["10"] == HOSTILE[0]
    assert page.data[0]["shown"]["13"] == "<U+2028><U+2029>"
    assert title in page.text
    assert not [name for _, attributes in page.elements for name in attributes if name[:2] == "on"]


@given(st.text(st.characters(exclude_categories=[])), st.text())
def test_any_text_survives_the_way_into_the_page(piece, title):
    from .simulator import spoken

    trajectory = spoken("one two", block_size=3, prompt_text=piece)
    trajectory.pieces = dict.fromkeys(trajectory.pieces, piece)
    text = render_html([build_grid(trajectory)], title)
    text.encode("utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert set(page.data[0]["text"].values()) == {encodable(piece)}
    assert page.data[0]["prompt"] == encodable(piece)


def test_the_page_is_self_contained(tmp_path, sliding, block):
    text = write_html([sliding, block], tmp_path / "x.html").read_text("utf-8")
    page = Page(text)
    assert not re.findall(r"https?:|//[a-z]|url\(|@import|\bimport\(", text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "base", "object")
        assert "src" not in attributes and "style" not in attributes
    policy = next(
        attributes["content"]
        for tag, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; ")
    for source in (page.styles[0], page.scripts[1]):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_numbers_without_javascript(tmp_path, sliding, block):
    page = Page(write_html([sliding, block], tmp_path / "x.html").read_text("utf-8"))
    text = " ".join(part.strip() for part in page.text if part.strip())
    assert "1. count 5 3 1.67 2 1 4 sliding" in text
    assert "2. no prompt text 5 4 1.25 1 0 3 block" in text
    assert "All 2 10 7 1.43 3 1" in text


def test_labels_leave_out_the_chat_template(sliding):
    template = "<|im_start|>system You are helpful.<|im_end|><|im_start|>user "
    grids = [
        build_grid(replace(sliding, prompt_text=template + question))
        for question in ("Write a poem", "Write prose", "Count")
    ]
    options = re.findall(r"<option[^>]*>(.*?)</option>", render_html(grids, "t"))
    assert options == ["1. … Write a poem", "2. … Write prose", "3. … Count"]
    alone = re.findall(r"<option[^>]*>(.*?)</option>", render_html(grids[:1], "t"))
    assert alone[0].startswith("1. &lt;|im_start|&gt;system")


def test_data_mirror_the_grid(tmp_path, sliding):
    data = Page(write_html([sliding], tmp_path / "x.html").read_text("utf-8")).data[0]
    assert [row["states"] for row in data["rows"]] == ["wwr", "frwR", "fFrw", "fF"]
    assert [row["position"] for row in data["rows"]] == [0, 0, 1, 3]
    assert data["fixedAt"] == [1, 2, 2, 3, 3]
    assert data["totals"]["fastForwarded"] == 2


def test_errors_say_which_trajectory(tmp_path, sliding):
    with pytest.raises(ReportError, match="there are no trajectories"):
        write_html([], tmp_path / "x.html")
    broken = [sliding, replace(sliding, iterations=[])]
    with pytest.raises(ReportError, match="trajectory 2 of 2: the trajectory has no iterations"):
        write_html(broken, tmp_path / "x.html")
    with pytest.raises(ReportError, match="trajectory 2 of 2"):
        write_report(broken, tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


def test_write_report(tmp_path, sliding, block):
    folder = tmp_path / "new" / "report"
    paths = write_report([sliding, block], folder, title="Two")
    assert [path.name for path in paths] == [
        "index.html",
        "trajectories.jsonl",
        "trajectory-001.png",
        "trajectory-002.png",
    ]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert trajectory_files.load(paths[1]) == [sliding, block]
    assert "<h1>Two</h1>" in paths[0].read_text("utf-8")
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in paths)


def test_a_failed_write_leaves_the_old_file(tmp_path, sliding, monkeypatch):
    path = tmp_path / "index.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cllm.files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_html([sliding], path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
