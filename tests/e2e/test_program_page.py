"""docs/program.md is a session that happens as it is written."""

from __future__ import annotations

import doctest
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "program.md"


def test_session():
    results = doctest.testfile(str(PAGE), module_relative=False)
    assert results.attempted >= 30
    assert results.failed == 0
