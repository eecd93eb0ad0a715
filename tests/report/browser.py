"""Headless Chromium for the tests: one fresh profile a call, no network."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
EXECUTABLE = next((path for name in NAMES if (path := shutil.which(name))), None)

needs_chromium = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"none of {', '.join(NAMES)} is installed"
)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--virtual-time-budget=4000",
    # whatever the page asked for would fail, and be seen to
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def run_chromium(page: Path, fragment: str, *flags: str) -> str:
    """Open a file from disk with `fragment` behind its address; returns the standard output."""
    assert EXECUTABLE is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [EXECUTABLE, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri() + fragment],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=90,
            check=True,
        )
    return done.stdout


def dump(page: Path, fragment: str = "", size: str = "1280,1000") -> str:
    """The document after its scripts have run."""
    return run_chromium(page, fragment, "--dump-dom", f"--window-size={size}")


def screenshot(page: Path, picture: Path, fragment: str = "", size: str = "1280,1000") -> Path:
    """A picture of the window."""
    run_chromium(page, fragment, f"--screenshot={picture}", f"--window-size={size}")
    return picture
