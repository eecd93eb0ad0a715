"""What pytest and compute-sanitizer wrote, as data."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree

# A finding's first line, after the tool's bar: what it says of memory, races and failed calls.
_FINDING = re.compile(
    r"^(Invalid |Uninitialized |Error: |Warning: |Barrier error|Program hit |Fatal |Misaligned |"
    r"Internal |Leaked |Target application returned an error)"
)
# "at kernel(int *)+0x88 in file.cu:40", and of older versions "at 0x88 in file.cu:40:kernel(int *)"
_AT = re.compile(r"\bat (?:0x[0-9a-f]+ in (?:\S+?:\d+:)?)?([A-Za-z_][\w:<>, ]*?)\s*(?:\(|\+0x|$)")
_NAMELESS = re.compile(r"\bvoid |<unnamed>::|\(anonymous namespace\)::")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def junit_counts(text: str) -> dict[str, Any]:
    """passed, failed, errors, skipped and the names of what failed, from pytest's JUnit XML."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    outcome: Counter[str] = Counter()
    broken, reasons = [], Counter()
    for case in cases:
        kinds = {child.tag for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        if "failure" in kinds or "error" in kinds:
            outcome["failed" if "failure" in kinds else "errors"] += 1
            broken.append(name)
        elif (skipped := case.find("skipped")) is not None:
            outcome["skipped"] += 1
            reasons[skipped.get("message") or "no reason"] += 1
        else:
            outcome["passed"] += 1
    counts = {name: outcome[name] for name in ("passed", "failed", "errors", "skipped")}
    return {**counts, "not_passed": broken, "skip_reasons": dict(reasons)}


def sanitizer_report(text: str) -> dict[str, Any]:
    """A tool's log: its own count, and its findings by (kernel, what it says), most frequent first.

    `errors` is None where the log has no summary: then the tool did not come to its end.
    """
    found: Counter[tuple[str, str]] = Counter()
    message, errors = None, None
    for line in text.splitlines():
        bare = line.removeprefix("=========").strip()
        if summary := _SUMMARY.search(bare):
            errors = (errors or 0) + int(summary[1])
            message = None
            continue
        if _FINDING.match(bare):
            if message is not None:
                found["", message] += 1
            message = re.sub(r"0x[0-9a-f]+", "0x", bare)[:160]
        if message is not None and (at := _AT.search(_NAMELESS.sub("", bare))):
            found[at[1], re.sub(r" at .*", "", message)] += 1
            message = None
    if message is not None:
        found["", message] += 1
    findings = [
        {"kernel": kernel or None, "message": what, "count": count}
        for (kernel, what), count in found.most_common()
    ]
    return {"errors": errors, "findings": findings}


def launch_lines(text: str) -> list[dict[str, Any]]:
    """The lines of launches.py, among whatever else was printed."""
    lines = [line for line in text.splitlines() if line.startswith('{"op"')]
    return [json.loads(line) for line in lines]
