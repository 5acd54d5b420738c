"""Tapes: what each worker reads of the packed weights, in order. Known before the first token."""

from __future__ import annotations

from collections.abc import Sequence

from .ir import Phase, TapeItem


def make_tapes(phases: Sequence[Phase], n_workers: int) -> tuple[tuple[TapeItem, ...], ...]:
    tapes: list[list[TapeItem]] = [[] for _ in range(n_workers)]
    for index, phase in enumerate(phases):
        if phase.matrix is None:
            continue
        for worker, span in enumerate(phase.spans):
            if len(span):
                tapes[worker] += [TapeItem(index, *ends) for ends in phase.matrix.ranges(span.begin, span.end)]
    return tuple(map(tuple, tapes))
