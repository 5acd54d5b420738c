"""The trace of a forward: every phase and wait, in order, without gaps, and what the command writes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import flashformer as ff
from flashformer.bench.trace import WAIT, trace_forward
from flashformer.cli.app import app


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_slices_cover_each_worker_without_gaps(rows: int, threads: int) -> None:
    with ff.load("demo", threads=threads, streams=4, ctx=256) as llm:
        trace = trace_forward(llm, depth=40, rows=rows)
        phases = llm.program.phases
    slices = list(trace.slices())
    for worker in range(threads):
        mine = [s for s in slices if s.worker == worker]
        assert [s.name for s in mine] == [name for phase in phases for name in (WAIT, phase.op.value)]
        assert mine[0].begin == 0
        assert all(a.end == b.begin for a, b in pairwise(mine))
        assert all(s.begin <= s.end for s in mine)
    assert sum(s.n_bytes for s in slices) == trace.program.packed_bytes
    assert sum(share for share, _ in trace.totals().values()) == pytest.approx(1)
    assert 0.5 < trace.accounted <= 1


def test_no_worker_enters_a_phase_before_all_have_left_the_one_before() -> None:
    with ff.load("demo", threads=3, ctx=64) as llm:
        times = trace_forward(llm).times
    assert times.entered.shape == times.left.shape == (3, len(llm.program.phases))
    assert (np.diff(times.entered, axis=1) >= 0).all()
    assert (times.entered[:, 1:] >= times.left[:, :-1].max(axis=0)).all()
    assert times.begin <= times.entered.min()
    assert times.left.max() <= times.end


def test_tracing_changes_no_token() -> None:
    with ff.load("demo", ctx=128) as llm:
        expected = llm.generate("def ", max_tokens=20).token_ids
        trace_forward(llm)
        assert llm.generate("def ", max_tokens=20).token_ids == expected


def test_times_are_kept_until_they_are_forgotten() -> None:
    with ff.load("demo", ctx=64) as llm:
        kept = []
        for change in (llm.kernel.keep_times, llm.kernel.forget_times, llm.kernel.keep_times):
            change()
            llm.generate("def ", max_tokens=2)
            kept.append(bool(llm.kernel._native.times()))  # type: ignore[attr-defined]
    assert kept == [True, False, True]


def test_command(tmp_path: Path) -> None:
    out, html = tmp_path / "t.json", tmp_path / "t.html"
    result = CliRunner().invoke(app, ["trace", "demo", "-o", str(out), "--html", str(html), "--threads", "2"])
    assert result.exit_code == 0, result.output
    assert "accounted for" in result.stdout
    events = json.loads(out.read_text())["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "X"} >= {"qkv", "attend", "o_proj", "gate_up", "down", "lm_head"}
    assert {e["tid"] for e in events} == {0, 1}
    page = html.read_text()
    assert page.count("<rect") > 50
    assert "http" not in page
    missing = CliRunner().invoke(app, ["trace", "demo", "-o", str(tmp_path / "no" / "t.json")])
    assert missing.exit_code == 2


def test_the_reference_keeps_no_times() -> None:
    with ff.load("demo", device="reference", ctx=16) as llm, pytest.raises(ff.DeviceError, match="keeps no times"):
        trace_forward(llm)
