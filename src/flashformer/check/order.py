"""Order: no worker reads what another may not have finished writing, or overwrites what another may still read.

Worker w can be in phase p while worker v is still in phase q <= p if and only if the arrivals that can be counted
with v held up inside q reach all of w's waits up to p. Tasks that can meet like this must not conflict. Workers in
one phase can always meet, by definition of a phase.

A forward without the head is the beginning of one with it, so every meeting that it allows is examined here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..program.ir import Program
from ..program.ops import Region
from .arrivals import Schedule, schedule
from .facts import Finding, PhaseFacts, RegionMap, region_name, task_name

RULE = "order"


def order(program: Program, facts: tuple[PhaseFacts, ...]) -> tuple[list[Finding], dict[str, int]]:
    """Findings, and how many pairs of tasks of different workers were proved ordered or independent."""
    findings = []
    for q, p, meet in meetings(program):
        findings += _conflicts(program, facts, q, p, meet)
    n_phases, n_workers = len(program.phases), program.target.n_workers
    n_pairs = n_workers * (n_workers - 1) * n_phases**2 // 2
    return findings, {"order": n_pairs}


def meetings(program: Program) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    """(q, p, (n_workers, n_workers)): [v, w] says whether worker v can be in phase q while w is in phase p >= q. Pairs
    of phases that nobody can be in at once may be left out."""
    plan = schedule(program.phases)
    without = plan.arrivals_without()  # (n_phases, n_classes)
    for q in range(len(program.phases)):
        # Some class can be in any phase up to here while some worker is still in q.
        last = int((plan.levels <= without[q].max()).sum(axis=1).max()) - 1
        for p in range(q, max(last, q) + 1):
            yield q, p, _can_meet(plan, without[q], q, p)


def _can_meet(plan: Schedule, without: NDArray[np.int64], q: int, p: int) -> NDArray[np.bool_]:
    """(n_workers, n_workers) whether [v, w]: v can be in phase q while w is in phase p."""
    of_classes = plan.levels[:, p] <= without[:, None]
    meet = of_classes[plan.class_of][:, plan.class_of] if p > q else np.ones((len(plan.class_of),) * 2, np.bool_)
    np.fill_diagonal(meet, False)
    return meet


def _conflicts(
    program: Program, facts: tuple[PhaseFacts, ...], q: int, p: int, meet: NDArray[np.bool_]
) -> list[Finding]:
    """At most one finding of each kind for phases q <= p. Coverage has proved that one phase's writes are disjoint."""
    early = [(*pair, "writes", "reads") for pair in _clashes(facts[q], facts[p].reads, meet)]
    if p > q:
        early += [(*pair, "writes", "overwrites") for pair in _clashes(facts[q], facts[p].writes, meet)]
        late = _clashes(facts[p], facts[q].reads, meet.T)
        early += [(v, region, w, "reads", "overwrites") for w, region, v in late]
    waits = program.phases[p].waits
    kinds = {(first, then) for *_, first, then in early}
    # Of each kind, the worker that waits least is closest to the missing edge.
    chosen = [min((e for e in early if e[3:] == kind), key=lambda e: waits[e[2]]) for kind in sorted(kinds)]
    return [_finding(program, (q, p), *clash) for clash in chosen]


def _clashes(writing: PhaseFacts, touched: RegionMap, meet: NDArray[np.bool_]) -> Iterator[tuple[int, Region, int]]:
    """(writer, region, toucher) where the writer writes into the region and the two can meet."""
    for region, touchers in touched.items():
        owners = writing.owners.get(region.space)
        if owners is None:
            continue
        among = np.array(touchers)
        if not meet[:, among].any():
            continue
        writers = owners.of(region)
        for i, j in np.argwhere(meet[np.ix_(writers, among)]):
            yield int(writers[i]), region, int(among[j])


def _finding(program: Program, at: tuple[int, int], v: int, region: Region, w: int, first: str, then: str) -> Finding:
    q, p = at
    if q == p:
        why = "both belong to one phase, in which all workers run at once; the spans must keep them apart"
    else:
        entered = max(phase.waits[w] for phase in program.phases[: p + 1])
        needed = counted(program, q, v, p, w) + 1
        why = (
            f"missing edge {q} -> {p}: worker {w} enters phase {p} after {entered} arrivals, and {needed - 1} can be "
            f"counted while worker {v} is still in phase {q}; a wait of at least {needed} is needed"
        )
    return Finding(
        RULE,
        f"{task_name(program, q, v)} {first} and {task_name(program, p, w)} {then} {region_name(region)}: {why}",
    )


def counted(program: Program, q: int, v: int, p: int, w: int) -> int:
    """Arrivals that can be counted with worker v held up in phase q and worker w kept out of phase p."""
    never = program.final_wait(len(program.phases)) + 1
    waits = list(program.phases[p].waits)
    waits[w] = never
    phases = list(program.phases)
    phases[p] = replace(phases[p], waits=tuple(waits))
    plan = schedule(tuple(phases))
    return int(plan.arrivals_without()[q, plan.class_of[v]])
