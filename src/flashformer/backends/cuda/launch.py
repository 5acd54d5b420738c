"""The kernel's argument and its report as the device has them: device/launch.cuh, field by field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ...errors import DeviceError
from ...program.ir import Program
from .. import nonfinite
from ..base import ROW_COLUMNS
from ..rows import Batch
from .nvrtc import device_headers
from .specialize import MAX_ROWS

POINTERS = (
    "weights", "kv", "work", "model", "phases", "schedule", "tapes", "tape_begin", "counter", "report",
    "accumulators", "times", "adjust_token", "adjust_penalty", "adjust_bias", "adjust_kept",
    "results", "failed",
)  # fmt: skip
COUNTS = ("base", "n_rows", "n_phases", "n_groups", "n_head_rows", "n_stops")
GROUPS = ("group_slot", "group_begin", "group_end", "group_pos")  # one entry per run of rows of one slot

LAUNCH = np.dtype(
    [
        *((name, "<u8") for name in (*POINTERS, "spin_limit")),
        ("seed", "<u8", MAX_ROWS),
        *((name, "<u4") for name in COUNTS),
        *((name, "<i4", MAX_ROWS) for name in (*GROUPS, "head_row")),
        *((name, dtype, MAX_ROWS) for name, dtype in ROW_COLUMNS.items() if name != "seed"),
        ("stops", "<i4", MAX_ROWS),
    ]
)

# Words of the report. Behind them one per block: 2 + the first place where it saw NaN or Inf, 0 for none.
FLAG, BLOCK, PHASE, SITE, SEEN, EXPECTED = range(6)
REPORT_WORDS = 8
FIRST_PLACE = 2


@cache
def site_names() -> tuple[str, ...]:
    """What each site orders, by number."""
    return tuple(re.findall(r'^ *X\(\w+, "(.*)"\)', device_headers()["sites.h"], re.MULTILINE))


def error_of(program: Program, report: list[int]) -> Exception:
    """What a report says that is not all zeros."""
    if not report[FLAG]:
        return nonfinite.at_place(program, min(word for word in report[REPORT_WORDS:] if word) - FIRST_PLACE)
    index, names = report[PHASE], site_names()
    phase = program.phases[index] if index < len(program.phases) else None
    where = f"{phase.op.value} of layer {phase.layer}" if phase is not None else "unknown"
    site = names[report[SITE]] if report[SITE] < len(names) else f"site {report[SITE]}"
    return DeviceError(
        f"block {report[BLOCK]} waited in vain in phase {index} ({where}): {site}; {report[SEEN]} seen, "
        f"{report[EXPECTED]} expected. The forward was given up, its slots must be computed anew. Please report"
    )


def parts(batch: Batch, most: int) -> Iterator[tuple[int, Batch]]:
    """(first row, part) of every launch of a forward: at most `most` rows, counted from the first."""
    for begin in range(0, batch.n_rows, most):
        end = min(begin + most, batch.n_rows)
        runs = [
            replace(run, begin=max(run.begin, begin) - begin, end=min(run.end, end) - begin,
                    pos=run.pos + max(begin - run.begin, 0))
            for run in batch.runs
            if run.begin < end and run.end > begin
        ]  # fmt: skip
        heads = tuple(row - begin for row in batch.head_rows if begin <= row < end)
        yield begin, Batch(end - begin, tuple(runs), heads)


def shifted(launch: NDArray[np.void], begin: int, n_rows: int) -> NDArray[np.void]:
    """A copy of a launch record whose first rows are [begin, begin + n_rows)."""
    record = launch.copy()
    for name in ROW_COLUMNS:
        record[name][:, :n_rows] = launch[name][:, begin : begin + n_rows]
    return record


def fill(launch: NDArray[np.void], batch: Batch) -> None:
    """The rows as runs, and which of them want something."""
    record = launch[0]
    record["n_rows"], record["n_groups"], record["n_head_rows"] = batch.n_rows, len(batch.runs), len(batch.head_rows)
    record["head_row"][: len(batch.head_rows)] = batch.head_rows
    for name in ("slot", "begin", "end", "pos"):
        record[f"group_{name}"][: len(batch.runs)] = [getattr(run, name) for run in batch.runs]
