"""Tests that a second pytest runs are reported here as what they were there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CONFTEST = f"""
import sys
sys.path.append({str(TESTS)!r})
import beside
beside.HERE, beside.BESIDE, beside.LEAST = ("test_here.py",), ("test_there.py",), 1

def pytest_addoption(parser):
    for name in ("--long", "--alone"):
        parser.addoption(name, action="store_true")
    parser.addoption("--outcomes")

def pytest_configure(config):
    plugin = beside.plugin(config)
    if plugin is not None:
        config.pluginmanager.register(plugin)
"""
HERE = "import os\ndef test_here(): open('here', 'w').write(str(os.getpid()))\n"
LAST = "import os\ndef test_last(): assert not os.path.exists('/proc/' + open('there').read())\n"
THERE = """
import os
import pytest

@pytest.fixture
def broken():
    raise OSError("no fixture")

@pytest.mark.parametrize("n", [1, 2])
def test_good(n):
    open("there", "w").write(str(os.getpid()))

def test_bad():
    print("said before")
    assert 1 == 2, "the reason"

def test_skipped():
    pytest.skip("not today")

def test_broken(broken): ...
"""


def run(folder: Path, there: str, *options: str) -> str:
    for name, text in {"conftest": CONFTEST, "test_here": HERE, "test_there": there, "test_zlast": LAST}.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-ra", "-v", "-p", "no:schemathesis", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core has no room for two processes")
def test_outcomes_are_those_of_the_second_process(tmp_path: Path) -> None:
    """Which has ended when the rest begins."""
    shown = run(tmp_path, THERE)
    assert "2 failed, 4 passed, 1 skipped" in shown, shown
    found = dict(re.findall(r"^(test_\S+) (PASSED|FAILED|SKIPPED)", shown, re.MULTILINE))
    assert list(found) == [
        "test_here.py::test_here",
        *(f"test_there.py::test_{name}" for name in ("good[1]", "good[2]", "bad", "skipped", "broken")),
        "test_zlast.py::test_last",
    ]
    for words in ("AssertionError: the reason", "said before", "OSError: no fixture", "not today"):
        assert words in shown
    assert (tmp_path / "here").read_text() != (tmp_path / "there").read_text()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core has no room for two processes")
def test_a_second_process_that_dies_fails_its_tests(tmp_path: Path) -> None:
    shown = run(tmp_path, THERE.replace('print("said before")', "os._exit(3)"), "--deselect=test_zlast.py")
    assert "3 failed, 3 passed" in shown, shown
    assert "The second process ended early" in shown


def test_one_process_runs_all_if_it_is_asked_to(tmp_path: Path) -> None:
    shown = run(tmp_path, THERE, "--alone", "-k", "here or good")
    assert (tmp_path / "here").read_text() == (tmp_path / "there").read_text(), shown
