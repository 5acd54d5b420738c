"""The stages, what share of the time each gets, and how they are run: each in a process of its own.

A process that dies, or that a broken kernel has to be killed with, takes no other stage along; what it had written
until then stays, and another process goes on behind the unit of the stage that it died in. A unit that lost the GPU's
context is run once more first, with the driver's core dump switched on: dumps may slow kernels down, so the first
process has none. Time that a stage leaves over goes to those after it.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .device import is_lost, note_failure
from .record import Clock, OutOfTimeError, Record
from .watch import HungError

BUDGET_S = 480.0
GRACE_S = 10.0  # beyond its share, after which a stage is killed
END_S = 20.0  # that a killed process may take to end
LOST, HUNG = 75, 76  # exit statuses: the context is lost, and what runs on the GPU does not end
LEAST_S = 10.0  # with which another process is worth while
SCRIPT = Path(__file__).resolve().parents[1] / "gpu.py"


@dataclass(frozen=True)
class Stage:
    """`share` of the time, in the same unit for all; `module` of this package."""

    number: int
    name: str
    share: float
    module: str


STAGES = (
    Stage(0, "wrappers", 30, "wrappers"),
    Stage(1, "micro", 80, "micro"),
    Stage(2, "tiny-models", 120, "tiny_models"),
    Stage(3, "llama-3.2-1b", 90, "models"),
    Stage(4, "llama-3.1-8b", 160, "models"),
    Stage(5, "rows-contexts", 300, "models"),
    Stage(6, "sanitizer", 180, "sanitizer"),
    Stage(7, "peers", 240, "peers"),
)
DEFAULT = STAGES[:5]

Runner = Callable[[Stage, float, Path], None]


def parse_stages(text: str) -> tuple[Stage, ...]:
    """`0,1,4` -> those stages, in order. Raises ArgumentTypeError."""
    numbers = text.split(",")
    if not all(n.isdecimal() and int(n) < len(STAGES) for n in numbers) or len({*numbers}) != len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: expected different numbers of 0 to {len(STAGES) - 1}, e.g. 0,1")
    return tuple(STAGES[n] for n in sorted(map(int, numbers)))


def parse_seconds(text: str) -> float:
    """A positive number. Raises ArgumentTypeError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, more than 0")
    return seconds


def share_s(stages: Sequence[Stage], left_s: float) -> float:
    """What the first of `stages` gets of the time that is left for all of them."""
    return max(left_s, 0.0) * stages[0].share / sum(stage.share for stage in stages)


def describe(stages: Sequence[Stage], budget_s: float) -> str:
    """A line per stage: number, name, seconds if all before take theirs."""
    whole = sum(stage.share for stage in stages)
    return "\n".join(f"{s.number} {s.name:14} {budget_s * s.share / whole:6.1f} s" for s in stages)


def path_of(stage: Stage, out: Path) -> Path:
    return out / f"gpu-{stage.number}-{stage.name}.json"


def run_stages(stages: Sequence[Stage], budget_s: float, out: Path, runner: Runner) -> int:
    """All of them, then the table. 0 if every stage is complete and every check passed."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget_s
    for i, stage in enumerate(stages):
        path_of(stage, out).unlink(missing_ok=True)  # of an earlier run
        seconds = share_s(stages[i:], end - time.monotonic())
        print(f"-- stage {stage.number} {stage.name}: {seconds:.0f} s", flush=True)
        runner(stage, seconds, out)
    documents = [read(stage, out) for stage in stages]
    print(table(documents))
    return 0 if all(d["complete"] and all(c["passed"] for c in d["checks"]) for d in documents) else 1


def run_apart(stage: Stage, seconds: float, out: Path) -> None:
    """In processes of its own, which are ended if they take too long; the next begins where the last one died."""
    end = time.monotonic() + seconds
    first, dump = 0, False
    while True:
        left = end - time.monotonic()
        code = _one_process(stage, left, out, first, dump)
        document = read(stage, out)
        unit, now = document["about"].get("unit"), document["about"].get("now", "its beginning")
        stopped = f"killed after {left + GRACE_S:.0f} s" if code is None else f"the process ended with {code}"
        if code and code < 0 and unit is not None:  # a signal: nobody else could say so
            document["checks"].append({"name": f"{now}: runs", "passed": False, "detail": stopped})
        if code != 0 and not (document["stopped"] and path_of(stage, out).exists()):
            document |= {"complete": False, "stopped": f"{stopped}, at {now}"}
        if code != 0:
            path_of(stage, out).write_text(json.dumps(document, indent=1))
        again = code == LOST and not dump  # the same unit, for its core dump
        if code in (0, 1, None) or unit is None or end - time.monotonic() < LEAST_S:
            return
        first, dump = (unit, True) if again else (unit + 1, dump)


def _one_process(stage: Stage, seconds: float, out: Path, first: int, dump: bool) -> int | None:
    """Its exit status, None if it had to be killed."""
    command = [sys.executable, str(SCRIPT), "--inside", str(stage.number), "--budget-s", f"{seconds:.3f}"]
    command += ["--skip", str(first), "--out", str(out)]
    process = subprocess.Popen(command, process_group=0, env=os.environ | (_dumping(stage, out) if dump else {}))
    try:
        return process.wait(seconds + GRACE_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # with the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)


def _dumping(stage: Stage, out: Path) -> dict[str, str]:
    """Variables with which the driver writes what a kernel that failed was doing, without the memory."""
    return {
        "CUDA_ENABLE_COREDUMP_ON_EXCEPTION": "1",
        "CUDA_ENABLE_LIGHTWEIGHT_COREDUMP": "1",
        "CUDA_COREDUMP_FILE": str(path_of(stage, out).with_suffix(".core")),
    }


def run_inside(number: int, seconds: float, out: Path, first: int = 0) -> int:
    """The work of one stage from a unit on, in this process. Its exit status; after LOST and HUNG the process must not
    end in order, which would wait for the GPU.
    """
    stage = STAGES[number]
    out.mkdir(parents=True, exist_ok=True)
    record = Record(stage.number, stage.name, path_of(stage, out), first)
    record.save()
    stacks = path_of(stage, out).with_suffix(".stack.txt")
    with open(stacks, "w") as file:
        faulthandler.dump_traceback_later(seconds + GRACE_S / 2, file=file)
        try:
            return _run(stage, record, Clock(seconds))
        finally:
            faulthandler.cancel_dump_traceback_later()
            if not stacks.stat().st_size:
                stacks.unlink()


def _run(stage: Stage, record: Record, clock: Clock) -> int:
    try:
        importlib.import_module(f"{__package__}.{stage.module}").run(record, clock)
    except OutOfTimeError as reached:
        record.stop(f"out of time at {reached}")
    except Exception as error:
        record.stop(f"{type(error).__name__}: {error}")
        if is_lost(error):
            return HUNG if isinstance(error, HungError) else LOST
        note_failure(record, f"stage {stage.number}", error)
        return 1
    else:
        record.finish()
    return 0


def read(stage: Stage, out: Path) -> dict[str, Any]:
    """What a stage wrote; of one that wrote nothing, that."""
    try:
        document: dict[str, Any] = json.loads(path_of(stage, out).read_text())
    except (OSError, ValueError) as error:
        return Record(stage.number, stage.name, path_of(stage, out)).document() | {"stopped": f"no result: {error}"}
    return document


def table(documents: Sequence[dict[str, Any]]) -> str:
    """A line per stage, under it what failed and what was fast."""
    lines = []
    for d in documents:
        checks, speeds = d["checks"], d["speeds"]
        passed = sum(c["passed"] for c in checks)
        state = "complete" if d["complete"] else f"NOT COMPLETE: {d['stopped']}"
        lines.append(f"{d['stage']} {d['name']:14} {passed}/{len(checks)} checks  {d['seconds']:6.1f} s  {state}")
        lines += [f"    FAILED {c['name']}: {c['detail']}" for c in checks if not c["passed"]][:12]
        lines += [f"    {s['name']:38} {s['value']:10.4g} {s['unit']}" for s in speeds if s["shown"]]
    return "\n".join(lines)
