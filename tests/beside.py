"""Half of the tests that only compute and compile run in a second pytest beside this one, which runs the other half.

Both halves come before all other tests, which may measure time, threads, memory and processes: the second process has
ended when those begin. What a test is in the second process it is here: passed, failed with the same words, or skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Beginnings of node ids. Both halves take about the same time; what compiles kernels of one text is in one of them.
HERE = (
    "tests/e2e/test_lm_eval.py",
    "tests/gpu_on_host/test_forward",
    "tests/gpu_on_host/test_gpu_stages_bisect.py",
    "tests/gpu_on_host/test_parts.py",
    "tests/gpu_on_host/test_simulator.py",
    "tests/gpu_on_host/test_wrappers.py",
)
BESIDE = (
    "tests/cuda_compile/",
    "tests/gpu_on_host/test_attend.py",
    "tests/gpu_on_host/test_embed.py",
    "tests/gpu_on_host/test_orders.py",
    "tests/gpu_on_host/test_products.py",
    "tests/gpu_on_host/test_sample.py",
    "tests/pure/test_family_specs.py",
    "tests/pure/test_gpu_evidence.py::test_all_kernels_of_all_stages_are_known_ahead",
    "tests/pure/test_mutants.py",
    "tests/pure/test_shapes.py",
)
LEAST = 20  # tests of a half for which a process is started


class Elsewhere(pytest.Item):
    """A test that the second process runs."""

    def __init__(self, *, beside: Beside, place: tuple[Any, int | None, str], **node: Any) -> None:
        super().__init__(**node)
        self._beside, self._place = beside, place

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self._place

    def runtest(self) -> None:
        outcome, text = self._beside.outcome(self.nodeid)
        if outcome == "skipped":
            pytest.skip(text)
        if outcome != "passed":
            pytest.fail(text, pytrace=False)


class Beside:
    """The plugin of the process that starts the other."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()
        self._outcomes: dict[str, tuple[str, str]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        here = [item for item in items if item.nodeid.startswith(HERE)]
        there = [item for item in items if item.nodeid.startswith(BESIDE)]
        if min(len(here), len(there)) < LEAST:
            return
        rest = [item for item in items if not item.nodeid.startswith((*HERE, *BESIDE))]
        items[:] = here
        for item in there:
            assert item.parent is not None
            items.append(Elsewhere.from_parent(item.parent, name=item.name, beside=self, place=item.reportinfo()))
        items += rest

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Iterator[None]:
        there = [item.nodeid for item in session.items if isinstance(item, Elsewhere)]
        if not there or session.config.option.collectonly:
            return (yield)
        with tempfile.TemporaryDirectory() as folder:
            self._folder = Path(folder)
            (self._folder / "tests").write_text("\n".join(there))
            options = ["-q", "--long", "-p", "no:cacheprovider", f"--outcomes={folder}/outcomes", f"@{folder}/tests"]
            with (self._folder / "shown").open("wb") as shown:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pytest", *options],
                    cwd=session.config.rootpath, stdin=subprocess.DEVNULL, stdout=shown, stderr=subprocess.STDOUT,
                )  # fmt: skip
            try:
                return (yield)
            finally:
                self._process.kill()
                self._process.wait()

    def outcome(self, nodeid: str) -> tuple[str, str]:
        """(passed, failed or skipped, its words), once all tests of the second process have ended."""
        assert self._process is not None
        if self._process.returncode is None:
            try:
                self._process.wait()
            finally:
                self._process.kill()  # if the time of this test is over
                self._process.wait()
            lines = map(json.loads, (self._folder / "outcomes").read_text().splitlines())
            self._outcomes = {line["nodeid"]: (line["outcome"], line["text"]) for line in lines}
        shown = self._folder / "shown"
        return self._outcomes.get(nodeid) or ("failed", f"The second process ended early:\n{shown.read_text()}")


class Outcomes:
    """The plugin of the second process: a line for every test, in a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self._reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)
        if report.when != "teardown":
            return
        outcomes = {one.outcome for one in self._reports}
        outcome = next(some for some in ("failed", "skipped", "passed") if some in outcomes)
        text = "\n".join(_words(one) for one in self._reports if one.outcome == outcome != "passed")
        print(json.dumps({"nodeid": report.nodeid, "outcome": outcome, "text": text}), file=self._file, flush=True)
        self._reports = []


def _words(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # (path, line, reason) of what is skipped
        return report.longrepr[2]
    return "\n".join([report.longreprtext, *(f"-- {name}\n{text}" for name, text in report.sections)])


def plugin(config: pytest.Config) -> Beside | Outcomes | None:
    """What this process has to do, if anything."""
    if config.getoption("--outcomes"):
        return Outcomes(Path(config.getoption("--outcomes")))
    one_only = config.getoption("--long") or config.getoption("--alone") or config.getoption("usepdb")
    return None if one_only or len(os.sched_getaffinity(0)) == 1 else Beside()
