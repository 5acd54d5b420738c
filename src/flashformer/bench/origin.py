"""Which source a number was measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ..version import __version__


def commit() -> str:
    """Short commit of the checkout this package runs from, `-dirty` if changed; the version if it is installed."""
    package = Path(__file__).resolve().parent.parent
    if _git(package, "ls-files", "--error-unmatch", "version.py") is None:
        return __version__
    head = _git(package, "rev-parse", "--short=10", "HEAD")
    if head is None:
        return __version__
    return head + ("-dirty" if _git(package, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(("git", *args), cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
