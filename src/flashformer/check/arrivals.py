"""How many arrivals can be counted, whatever the workers' timing.

Arrivals are counted in one number that only grows, and a worker enters phase p when it has reached every wait up
to p. An arrival never makes a wait unreachable, so the most that can be counted is found by running every worker as
far as it gets, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..program.ir import Phase

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """Workers with equal waits behave alike, so runs are made over classes of them."""

    levels: Counts  # (n_classes, n_phases) arrivals needed to be in phase p: the largest wait up to p
    sizes: Counts  # (n_classes) workers
    class_of: Counts  # (n_workers)

    def arrivals(self) -> int:
        """All that are counted when nobody is held up."""
        return self._run(0, held=0, phase=self.levels.shape[1])

    def arrivals_without(self) -> Counts:
        """(n_phases, n_classes) the most that are counted while one worker of the class has not finished the phase."""
        n_classes, n_phases = self.levels.shape
        result = np.zeros((n_phases, n_classes), np.int64)
        for held in range(n_classes):
            total = 0  # a worker held up later holds the others up no earlier
            for phase in range(n_phases):
                total = self._run(total, held, phase)
                result[phase, held] = total
        return result

    def _run(self, start: int, held: int, phase: int) -> int:
        """Arrivals with one worker of class `held` kept from finishing `phase`; `start` of them are known."""
        total = start
        while True:
            finished = (self.levels <= total).sum(axis=1)
            reached = int(self.sizes @ finished) - max(int(finished[held]) - phase, 0)
            if reached == total:
                return total
            total = reached


def schedule(phases: tuple[Phase, ...]) -> Schedule:
    waits = np.array([phase.waits for phase in phases], np.int64)  # (n_phases, n_workers)
    levels = np.maximum.accumulate(waits, axis=0).T
    classes, class_of, sizes = np.unique(levels, axis=0, return_inverse=True, return_counts=True)
    return Schedule(classes, sizes.astype(np.int64), class_of.reshape(-1).astype(np.int64))
