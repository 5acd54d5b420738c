"""Which source a number was measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ..version import __version__

RESULTS = "benchmarks/results"  # in the checkout; what is measured there is no part of what is measured


def commit() -> str:
    """Short commit of the checkout this package runs from, `-dirty` if changed; the version if it is installed."""
    package = Path(__file__).resolve().parent.parent
    if _git(package, "ls-files", "--error-unmatch", "version.py") is None:
        return __version__
    head = _git(package, "rev-parse", "--short=10", "HEAD")
    if head is None:
        return __version__
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ":/", f":/!{RESULTS}")
    return head + ("-dirty" if changed else "")


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(("git", *args), cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
