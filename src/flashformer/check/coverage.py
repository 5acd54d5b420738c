"""Coverage: every output element is produced exactly once, every tile is read exactly once and in tape order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..program.ir import Op, Program, Space, TapeItem
from ..program.ops import written_extent
from ..program.pack import row_map
from .facts import Finding, PhaseFacts, phase_name, region_name, task_name

LAYER_OPS = (Op.QKV, Op.ATTEND, Op.O_PROJ, Op.GATE_UP, Op.DOWN)

RULE = "coverage"


def cover(program: Program, facts: tuple[PhaseFacts, ...]) -> tuple[list[Finding], dict[str, int]]:
    """Findings, and how many regions and tiles were proved. The spans must be within bounds."""
    findings = sequence(program) + units(program) + sources(program) + tapes(program)
    n_regions = 0
    for phase in range(len(program.phases)):
        findings += elements(program, phase, facts[phase])
        n_regions += sum(len(workers) for workers in facts[phase].writes.values())
    n_tiles = sum(phase.matrix.n_tiles for phase in program.phases if phase.matrix)
    return findings, {"coverage": n_regions, "tiles": n_tiles}


def sequence(program: Program) -> list[Finding]:
    """The phases of a forward: embed, five per layer, lm_head, sample; the head begins at lm_head."""
    found = [(phase.op, phase.layer) for phase in program.phases]
    layers = [(op, layer) for layer in range(program.spec.n_layers) for op in LAYER_OPS]
    expected = [(Op.EMBED, -1), *layers, (Op.LM_HEAD, -1), (Op.SAMPLE, -1)]
    if found != expected:
        pairs = zip(found, expected, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
        return [
            Finding(RULE, f"phase {at} is {found[at : at + 1]}, expected {expected[at : at + 1]} (op, layer) there")
        ]
    if program.head_begin != len(expected) - 2:
        return [Finding(RULE, f"head_begin is {program.head_begin}, but lm_head is phase {len(expected) - 2}")]
    return []


def units(program: Program) -> list[Finding]:
    """Every unit of a phase belongs to exactly one worker."""
    findings = []
    for index, phase in enumerate(program.phases):
        count = np.zeros(phase.n_units, np.int32)
        for span in phase.spans:
            count[span.begin : span.end : span.step] += 1
        for unit in np.flatnonzero(count != 1)[:1]:
            takers = [w for w, span in enumerate(phase.spans) if unit in range(span.begin, span.end, span.step)]
            findings.append(
                Finding(
                    RULE,
                    f"{phase_name(program, index)}: unit {unit} of {phase.n_units} is executed by workers {takers}, "
                    "expected exactly one",
                )
            )
    return findings


def sources(program: Program) -> list[Finding]:
    """Every row of the stacked source tensors is in exactly one place of a packed matrix."""
    findings = []
    for index, phase in enumerate(program.phases):
        if phase.matrix is None:
            continue
        rows = row_map(phase.matrix)
        count = np.bincount(rows[rows >= 0], minlength=phase.matrix.n_out)
        for row in np.flatnonzero(count != 1)[:1]:
            findings.append(
                Finding(
                    RULE,
                    f"{phase_name(program, index)}: row {row} of {', '.join(phase.matrix.roles)} is packed "
                    f"{count[row]} times, expected once",
                )
            )
    return findings


def elements(program: Program, index: int, facts: PhaseFacts) -> list[Finding]:
    """The workers' written regions are disjoint and together exactly what the phase must produce."""
    findings = []
    extents = written_extent(program, program.phases[index])
    for region, writers in facts.writes.items():
        begin, end = extents.get(region.space, (0, 0))
        if region.begin < begin or region.end > end:
            findings.append(
                Finding(
                    RULE,
                    f"{task_name(program, index, writers[0])} writes {region_name(region)}, outside "
                    f"what the phase produces, [{begin}, {end})",
                )
            )
    for space, (begin, end) in extents.items():
        count = np.zeros(end - begin, np.int32)
        inside = [(r, w) for r, w in facts.writes.items() if r.space is space and begin <= r.begin and r.end <= end]
        for region, writers in inside:
            count[region.begin - begin : region.end - begin : region.step] += len(writers)
        for at in np.flatnonzero(count != 1)[:1] + begin:
            findings.append(Finding(RULE, _element(program, index, space, int(at), facts)))
    return findings


def _element(program: Program, index: int, space: Space, at: int, facts: PhaseFacts) -> str:
    writers = [
        f"worker {w} by [{r.begin}, {r.end})"
        for r, ws in facts.writes.items()
        if r.space is space and at in range(r.begin, r.end, r.step)
        for w in ws
    ]
    return (
        f"{phase_name(program, index)}: {space.value}[{at}] is written by {', '.join(writers) or 'nobody'}, "
        "expected exactly one worker"
    )


def tapes(program: Program) -> list[Finding]:
    """A worker's tape is the byte ranges of its non-empty spans in phase order; together they are every byte once."""
    findings = []
    read = sorted((item.begin, item.end) for tape in program.tapes for item in tape)
    total = sum(phase.matrix.n_bytes for phase in program.phases if phase.matrix)
    if sum(end - begin for begin, end in read) != total or any(b[0] < a[1] for a, b in pairwise(read)):
        findings.append(Finding(RULE, f"the tapes do not read each of the {total} bytes of tiles once"))
    for worker, tape in enumerate(program.tapes):
        expected = tuple(
            TapeItem(index, *ends)
            for index, phase in enumerate(program.phases)
            if phase.matrix and len(phase.spans[worker])
            for ends in phase.matrix.ranges(phase.spans[worker].begin, phase.spans[worker].end)
        )
        if tape != expected:
            pairs = zip(tape, expected, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tape), len(expected)))
            findings.append(
                Finding(
                    RULE,
                    f"tape of worker {worker}: item {at} of {len(tape)} is {tape[at : at + 1]}, expected "
                    f"{expected[at : at + 1]} of {len(expected)}, the bytes of its tiles in phase order",
                )
            )
    return findings
