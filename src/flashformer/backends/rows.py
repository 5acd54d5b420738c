"""The rows of one forward, validated and cut into runs: what every backend needs before it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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
    adjusted = 0  # adjustments of the rows before
    for row in head_rows:
        for name, allowed, expected in _SAMPLING:
            value = getattr(rows, name)[row].item()
            if not allowed(value):
                raise RequestError(f"row {row}: {name} is {value}, expected {expected}")
        adjusted = _read_adjustments(rows, row, adjusted, vocab_size)
    return Batch(n_rows, _runs(slots, positions), head_rows)


_SAMPLING: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("temperature", lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    ("top_k", lambda x: x >= 0, "0 or more"),
    ("top_p", lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    ("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    ("choice", lambda x: x >= 0, "0 or more"),
)


def _read_adjustments(rows: Rows, row: int, after: int, vocab_size: int) -> int:
    """Checks the adjustments of a row, which lie behind those of the rows before; gives their end."""
    begin, end = int(rows.adjust_begin[row]), int(rows.adjust_end[row])
    if begin == end and 0 <= end <= len(rows.adjust_token):
        return after
    if not after <= begin < end <= len(rows.adjust_token):
        raise RequestError(
            f"row {row}: adjustments [{begin}, {end}), expected a range from {after} to {len(rows.adjust_token)}"
        )
    ids, penalty, bias = (getattr(rows, f"adjust_{name}")[begin:end] for name in ("token", "penalty", "bias"))
    if ids.min() < 0 or ids.max() >= vocab_size or len(np.unique(ids)) < len(ids):
        raise RequestError(f"row {row}: adjusted token ids must be 0 to {vocab_size - 1}, each once")
    if not ((penalty > 0) & np.isfinite(penalty)).all() or not np.isfinite(bias).all():
        raise RequestError(f"row {row}: penalties must be positive and finite, biases finite")
    return end


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
