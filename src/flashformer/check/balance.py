"""Balance: no worker reads more of the weights than another, by more than whole tiles make necessary."""

from __future__ import annotations

import numpy as np

from ..program.ir import Program
from ..program.ops import bytes_read
from .facts import Finding, phase_name

RULE = "balance"
SPREAD = 0.01  # of the mean, over a forward


def balance(program: Program) -> tuple[list[Finding], dict[str, int]]:
    """Findings, and how many phase boundaries were proved.

    A worker that got a tile in a phase ends it at most one tile of that phase above the least loaded worker. So
    wherever a phase has enough tiles to level what came before, any two workers differ by at most one of its tiles.
    Totals differ by at most 1 percent, or by the largest tile where that is more.
    """
    findings = []
    workers = range(program.target.n_workers)
    total = np.zeros(len(workers), np.int64)
    largest = boundaries = 0
    for index, phase in enumerate(program.phases):
        if index == program.head_begin:
            findings += _spread(total, largest, "without the head")
        if phase.matrix is None:
            continue
        now = np.array([bytes_read(phase, w) for w in workers], np.int64)
        total += now
        boundaries += 1
        largest = max(largest, phase.matrix.tile_bytes)
        above = np.where(now > 0, total - total.min(), 0)
        if above.max() > phase.matrix.tile_bytes:
            findings.append(
                Finding(
                    RULE,
                    f"after {phase_name(program, index)} worker {above.argmax()} has read {above.max()} bytes more "
                    f"than worker {total.argmin()}, expected at most one tile, {phase.matrix.tile_bytes}",
                )
            )
    return findings + _spread(total, largest, "with the head"), {"balance": boundaries}


def _spread(total: np.ndarray[tuple[int, ...], np.dtype[np.int64]], largest: int, name: str) -> list[Finding]:
    spread, allowed = int(total.max() - total.min()), max(SPREAD * float(total.mean()), float(largest))
    if spread <= allowed:
        return []
    return [
        Finding(
            RULE,
            f"forward {name}: workers {total.argmax()} and {total.argmin()} read {total.max()} and {total.min()} "
            f"bytes, expected within {allowed:.0f} of each other",
        )
    ]
