"""Balance: no worker reads more of the weights than another, by more than whole tiles make necessary."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..program.ir import Program
from ..program.ops import bytes_read
from .facts import Finding, phase_name

RULE = "balance"
Bytes = np.ndarray[tuple[int, ...], np.dtype[np.int64]]  # (n_workers)


def balance(program: Program) -> tuple[list[Finding], dict[str, int]]:
    """Findings, and how many phase boundaries were proved.

    All wait for the worker that has most tiles of a phase, so of n tiles for w workers nobody has more than n / w,
    rounded up. Who has fewer has room. Who got a tile ends the phase at most one of its tiles above each that has room,
    or the tile would have been better there.

    So no two workers ever differ by more than the largest tile until then, which is proved too. For let a be above b
    after a phase. If a got a tile and b has room, the rule says so. If a got none, or b as many as anybody may have,
    they are no further apart than they were.
    """
    findings = []
    workers = range(program.target.n_workers)
    total = np.zeros(len(workers), np.int64)
    largest = boundaries = 0
    for index, phase in enumerate(program.phases):
        if phase.matrix is None:
            continue
        now = np.array([bytes_read(phase, w) for w in workers], np.int64)
        total += now
        boundaries += 1
        tile = phase.matrix.tile_bytes
        largest = max(largest, tile)
        messages = _level(now, total, tile, -(-phase.n_units // len(workers)) * tile, largest)
        findings += [Finding(RULE, f"{phase_name(program, index)}: {message}") for message in messages]
    return findings, {"balance": boundaries}


def _level(now: Bytes, total: Bytes, tile: int, most: int, largest: int) -> Iterator[str]:
    """What is wrong after a phase in which workers read `now` bytes, `total` since the forward began."""
    if now.max() > most:
        yield f"worker {now.argmax()} reads {now.max()} bytes, expected at most {most}"
    got, room = np.where(now > 0, total, 0), np.where(now < most, total, total.max())
    for high, low, allowed, why in ((got, room, tile, ", which has room"), (total, total, largest, "")):
        a, b = high.argmax(), low.argmin()
        if high[a] - low[b] > allowed:
            apart = f"worker {a} has read {high[a] - low[b]} bytes more than worker {b}{why}"
            yield f"{apart}, expected at most one tile, {allowed}"
