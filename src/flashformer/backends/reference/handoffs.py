"""Hand-offs, watched while they happen: every coordinate a task reads must be the newest that it is meant to see."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...program.ir import Program, Space
from ...program.ops import OPS, Region, written_extent

UNWRITTEN = -1
Versions = dict[Space, NDArray[np.int32]]  # per coordinate, the phase that wrote it last in this forward


class HandOffs:
    """Knows which phase each read must see, and which phase each coordinate comes from."""

    def __init__(self, program: Program) -> None:
        self._program = program
        sizes: dict[Space, int] = {}
        for phase in program.phases:
            for space, (_, end) in written_extent(program, phase).items():
                sizes[space] = max(end, sizes.get(space, 0))
        self._written: Versions = {space: np.empty(size, np.int32) for space, size in sizes.items()}
        self._expected: list[Versions] = []  # per phase, of the buffers that it reads
        self.begin()
        for index, phase in enumerate(program.phases):
            read = {r.space for w in range(program.target.n_workers) for r in OPS[phase.op].reads(program, phase, w)}
            self._expected.append({space: self._written[space].copy() for space in read})
            for space, (begin, end) in written_extent(program, phase).items():
                self._written[space][begin:end] = index
        self.begin()

    def begin(self) -> None:
        """A new forward: nothing is written yet."""
        for versions in self._written.values():
            versions[:] = UNWRITTEN

    def check_reads(self, index: int, worker: int) -> None:
        """Raises AssertionError if the task would read something stale, missing or already overwritten."""
        phase = self._program.phases[index]
        for region in OPS[phase.op].reads(self._program, phase, worker):
            at = slice(region.begin, region.end, region.step)
            seen, expected = self._written[region.space][at], self._expected[index][region.space][at]
            if (wrong := np.flatnonzero(seen != expected)).size:
                raise AssertionError(self._message(index, worker, region, int(wrong[0]), seen, expected))

    def note_writes(self, index: int, worker: int) -> None:
        phase = self._program.phases[index]
        for region in OPS[phase.op].writes(self._program, phase, worker):
            self._written[region.space][region.begin : region.end : region.step] = index

    def _message(
        self, index: int, worker: int, region: Region, at: int, seen: NDArray[np.int32], expected: NDArray[np.int32]
    ) -> str:
        phase = self._program.phases[index]
        return (
            f"phase {index} ({phase.op.value}, layer {phase.layer}) worker {worker} reads "
            f"{region.space.value}[{region.begin + at * region.step}] from phase {seen[at]}, expected phase "
            f"{expected[at]}: a hand-off is missing"
        )
