"""Sharing: whoever is free may execute a unit of a shared phase, whatever the spans say.

So nobody may be in such a phase while another is in an earlier or later one, and what a unit reads of the spaces that
the phase writes may only be what it writes itself; units write apart.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import numpy as np

from ..program.ir import Phase, Program, Space, Span
from ..program.ops import OPS, Region, is_shared, written_extent
from .facts import NOBODY, Finding, phase_name, region_name
from .order import counted, meetings

RULE = "share"


def share(program: Program) -> tuple[list[Finding], dict[str, int]]:
    """Findings, and how many units were proved to be anybody's. The spans must be within bounds."""
    findings, proved, n_units = _meetings(program), set[Hashable](), 0
    for index, phase in enumerate(program.phases):
        if not is_shared(program, phase):
            continue
        n_units += phase.n_units
        layer = program.spec.layers[phase.layer] if phase.layer >= 0 else None
        kind = (phase.op, phase.n_units, phase.matrix and phase.matrix.tile_outputs, phase.fold, phase.to, layer)
        if kind not in proved:
            findings += _units(program, index)
            proved.add(kind)
    return findings, {"shared": n_units}


def _meetings(program: Program) -> list[Finding]:
    shared = [is_shared(program, phase) for phase in program.phases]
    if not any(shared):
        return []
    findings = []
    for q, p, meet in meetings(program):
        if p == q or not (shared[q] or shared[p]) or not meet.any():
            continue
        v, w = (int(worker) for worker in np.argwhere(meet)[0])
        needed = counted(program, q, v, p, w) + 1
        findings.append(
            Finding(
                RULE,
                f"worker {w} can be in {phase_name(program, p)} while worker {v} is in {phase_name(program, q)}, and "
                f"units of {phase_name(program, q if shared[q] else p)} change hands; a wait of at least {needed} is "
                "needed",
            )
        )
    return findings


def _units(program: Program, index: int) -> list[Finding]:
    """At most one finding for a phase."""
    phase = program.phases[index]
    info, alone = OPS[phase.op], _one_each(phase)
    extents: dict[Space, tuple[int, int]] = dict(written_extent(program, phase))
    extents.pop(Space.CANDIDATES, None)  # each worker has one of its own
    owners = {space: np.full(end - begin, NOBODY, np.int32) for space, (begin, end) in extents.items()}

    def of(region: Region) -> slice:
        begin = extents[region.space][0]
        return slice(region.begin - begin, region.end - begin, region.step)

    regions = [[r for r in info.writes(program, alone, unit) if r.space in extents] for unit in range(phase.n_units)]
    for unit, written in enumerate(regions):
        for region in written:
            if (owners[region.space][of(region)] != NOBODY).any():
                return [Finding(RULE, f"{phase_name(program, index)}: two units write {region_name(region)}")]
            owners[region.space][of(region)] = unit
    for unit in range(phase.n_units):
        for region in info.reads(program, alone, unit):
            if region.space in extents and not np.isin(owners[region.space][of(region)], (unit, NOBODY)).all():
                return [
                    Finding(
                        RULE,
                        f"{phase_name(program, index)}: unit {unit} reads {region_name(region)}, which other units "
                        "write, and units change hands",
                    )
                ]
    return []


def _one_each(phase: Phase) -> Phase:
    """The phase with a worker for every unit."""
    return replace(phase, spans=tuple(Span(unit, unit + 1) for unit in range(phase.n_units)))
