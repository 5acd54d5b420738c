"""What the rules reason about: the regions of every task, gathered once, and how a failed proof reads.

A task is what one worker executes in one phase. Regions are resolved to the elements they cover, so steps and
overlaps need no case analysis: a forward of 160 phases touches a few million coordinates in all.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..program.ir import Program, Space
from ..program.ops import OPS, Region

NOBODY = -1

RegionMap = dict[Region, tuple[int, ...]]


@dataclass(frozen=True)
class Finding:
    """One reason why a Program must not run."""

    rule: str  # the module that found it
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}"


def phase_name(program: Program, phase: int) -> str:
    at = program.phases[phase]
    return f"phase {phase} ({at.op.value}, layer {at.layer})" if at.layer >= 0 else f"phase {phase} ({at.op.value})"


def task_name(program: Program, phase: int, worker: int) -> str:
    return f"{phase_name(program, phase)} worker {worker}"


def region_name(region: Region) -> str:
    step = f" step {region.step}" if region.step != 1 else ""
    return f"{region.space.value}[{region.begin}, {region.end}){step}"


@dataclass(frozen=True)
class Owners:
    """Which worker writes each coordinate begin + i of one buffer in one phase; NOBODY where none does."""

    begin: int
    workers: NDArray[np.int16]

    def of(self, region: Region) -> NDArray[np.int16]:
        """The distinct writers of a region's coordinates."""
        first = region.begin
        if first < self.begin:  # the first coordinate of the region that lies in the array
            first += -(-(self.begin - first) // region.step) * region.step
        found: NDArray[np.int16] = np.unique(
            self.workers[first - self.begin : max(region.end - self.begin, 0) : region.step]
        )
        return found[1:] if found.size and found[0] == NOBODY else found


@dataclass(frozen=True)
class PhaseFacts:
    """Regions of one phase, each with the workers that touch it, and the writers of each coordinate."""

    reads: RegionMap
    writes: RegionMap
    owners: dict[Space, Owners] = field(repr=False)


def gather(program: Program) -> tuple[PhaseFacts, ...]:
    """The facts of every phase. The spans must be within bounds."""
    facts = []
    for phase in program.phases:
        info, workers = OPS[phase.op], range(program.target.n_workers)
        reads, writes = (
            _by_region([regions(program, phase, w) for w in workers]) for regions in (info.reads, info.writes)
        )
        facts.append(PhaseFacts(reads, writes, _owners(writes)))
    return tuple(facts)


def _by_region(of_worker: list[tuple[Region, ...]]) -> RegionMap:
    found: defaultdict[Region, list[int]] = defaultdict(list)
    for worker, regions in enumerate(of_worker):
        for region in regions:
            found[region].append(worker)
    return {region: tuple(workers) for region, workers in found.items()}


def _owners(writes: RegionMap) -> dict[Space, Owners]:
    owners = {}
    for space in {region.space for region in writes}:
        regions = [region for region in writes if region.space is space]
        begin, end = min(r.begin for r in regions), max(r.end for r in regions)
        workers = np.full(end - begin, NOBODY, np.int16)
        for region in regions:
            workers[region.begin - begin : region.end - begin : region.step] = writes[region][-1]
        owners[space] = Owners(begin, workers)
    return owners
