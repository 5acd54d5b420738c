"""The rows of one forward, validated and cut into runs: what every backend needs before it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import RequestError
from ..program.ir import MAX_HEAD_ROWS, Program
from .base import Rows, Want


@dataclass(frozen=True)
class Run:
    """Rows [begin, end) of one slot at positions pos, pos + 1, ..."""

    slot: int
    begin: int
    end: int
    pos: int


@dataclass(frozen=True)
class Batch:
    """`head_rows[i]` is the i-th row that wants a token or logits."""

    n_rows: int
    runs: tuple[Run, ...]
    head_rows: tuple[int, ...]


def read_rows(rows: Rows, n_rows: int, program: Program) -> Batch:
    """The first `n_rows` rows as a Batch. Raises RequestError where one is out of its range."""
    target = program.target
    if not 1 <= n_rows <= target.rows:
        raise RequestError(f"forward over {n_rows} rows, expected 1 to {target.rows}: split the prompt into chunks")
    vocab_size, choices = program.spec.vocab_size, len(Want)
    tokens, slots = rows.token[:n_rows].tolist(), rows.slot[:n_rows].tolist()
    positions, wants = rows.pos[:n_rows].tolist(), rows.want[:n_rows].tolist()
    for what, values, end in (
        ("token id", tokens, vocab_size),
        ("slot", slots, target.streams),
        ("position", positions, target.ctx),
        ("want", wants, choices),
    ):
        if min(values) < 0 or max(values) >= end:
            at = next(i for i, value in enumerate(values) if not 0 <= value < end)
            raise RequestError(f"row {at}: {what} is {values[at]}, expected 0 to {end - 1}")
    head_rows = tuple(i for i, want in enumerate(wants) if want)
    if len(head_rows) > MAX_HEAD_ROWS:
        raise RequestError(f"{len(head_rows)} rows want a token or logits, expected at most {MAX_HEAD_ROWS}")
    for row in head_rows:
        temperature, choice = float(rows.temperature[row]), int(rows.choice[row])
        if not (math.isfinite(temperature) and temperature >= 0):
            raise RequestError(f"row {row}: temperature is {temperature}, expected a finite number, 0 or more")
        if choice < 0:
            raise RequestError(f"row {row}: choice is {choice}, expected 0 or more")
    return Batch(n_rows, _runs(slots, positions), head_rows)


def _runs(slots: list[int], positions: list[int]) -> tuple[Run, ...]:
    starts = [i for i in range(len(slots)) if i == 0 or slots[i] != slots[i - 1]]
    ends = [*starts[1:], len(slots)]
    runs = tuple(Run(slots[b], b, e, positions[b]) for b, e in zip(starts, ends, strict=True))
    if len({run.slot for run in runs}) < len(runs):
        raise RequestError(f"rows of slots {[run.slot for run in runs]}: expected the rows of one slot to be adjacent")
    for run in runs:
        for row in range(run.begin, run.end):
            expected = run.pos + row - run.begin
            if positions[row] != expected:
                raise RequestError(
                    f"row {row} of slot {run.slot}: position is {positions[row]}, expected {expected}, the next one"
                )
    return runs
