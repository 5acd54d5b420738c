"""Small Programs, and a search through every interleaving of one: the slow truth about its waits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from flashformer.formats import BF16, F32, Format
from flashformer.model import Activation, LayerSpec, ModelSpec, RopeKind, RopeSpec
from flashformer.program import Program, Target, build
from flashformer.program.ir import Phase, Space, Span
from flashformer.program.ops import OPS, is_shared
from flashformer.program.tape import make_tapes

Task = tuple[int, int]  # phase, worker
State = tuple[int, ...]  # phases finished by each worker


def spec(
    *, n_layers: int = 1, d_model: int = 48, n_heads: int = 4, n_kv_heads: int = 2, head_dim: int = 14, d_ff: int = 72,
    vocab_size: int = 101, bias: bool = False, tied: bool = False, **switches: Any,
) -> ModelSpec:  # fmt: skip
    layer = LayerSpec(
        n_heads, n_kv_heads, head_dim, d_ff, bias, bias, bias, 1e-5, Activation.SILU, head_dim**-0.5,
        RopeSpec(RopeKind.DEFAULT, 10000.0, head_dim), **switches,
    )  # fmt: skip
    return ModelSpec(d_model, vocab_size, 4096, (layer,) * n_layers, 1e-5, tied, 1, (2,))


def program(model: ModelSpec, n_workers: int, *, fmt: Format = BF16, ctx: int = 512, streams: int = 1) -> Program:
    return build(model, Target(n_workers, fmt, F32, 16, streams, ctx))


def with_phase(sound: Program, index: int, **changes: Any) -> Program:
    phases = list(sound.phases)
    phases[index] = dataclasses.replace(phases[index], **changes)
    return dataclasses.replace(sound, phases=tuple(phases))


def with_wait(sound: Program, index: int, worker: int, wait: int) -> Program:
    waits = list(sound.phases[index].waits)
    waits[worker] = wait
    return with_phase(sound, index, waits=tuple(waits))


def with_deal(sound: Program, index: int, counts: Sequence[int]) -> Program:
    """The tiles of a phase in these numbers, one of each worker; the tapes follow."""
    moved = with_phase(sound, index, spans=tuple(Span(*ends) for ends in pairwise([0, *accumulate(counts)])))
    return dataclasses.replace(moved, tapes=make_tapes(moved.phases, len(counts)))


def uneven(sound: Program) -> list[int]:
    """Phases, by the tapes, of which a worker has too many tiles, or has one that would be better with another."""
    found, totals = [], [0] * len(sound.tapes)
    for p, phase in enumerate(sound.phases):
        if phase.matrix is None:
            continue
        size = phase.matrix.tile_bytes
        n_tiles = [sum(item.end - item.begin for item in tape if item.phase == p) // size for tape in sound.tapes]
        totals = [total + n * size for total, n in zip(totals, n_tiles, strict=True)]
        limit = -(-phase.matrix.n_tiles // len(totals))
        givers = [total for total, n in zip(totals, n_tiles, strict=True) if n > 0]
        takers = [total for total, n in zip(totals, n_tiles, strict=True) if n < limit]
        better = any(max(a - size, b + size) < max(a, b) for a in set(givers) for b in set(takers))
        if max(n_tiles) > limit or better:
            found.append(p)
    return found


def _touched(sound: Program, phase: Phase, worker: int) -> tuple[set[tuple[Space, int]], set[tuple[Space, int]]]:
    """Coordinates that a task reads, and those that it writes."""
    info = OPS[phase.op]
    reads, writes = (
        {(r.space, x) for r in regions(sound, phase, worker) for x in range(r.begin, r.end, r.step)}
        for regions in (info.reads, info.writes)
    )
    return reads, writes


@lru_cache(maxsize=2)
def _conflicts(phases_key: tuple[tuple[object, ...], ...], holder: _Holder) -> frozenset[tuple[Task, Task]]:
    sound = holder.program
    workers = range(sound.target.n_workers)
    touched = {(p, w): _touched(sound, phase, w) for p, phase in enumerate(sound.phases) for w in workers}
    shared = [is_shared(sound, phase) for phase in sound.phases]  # whose units are anybody's
    return frozenset(
        (a, b)
        for a, (reads_a, writes_a) in touched.items()
        for b, (reads_b, writes_b) in touched.items()
        if a[1] != b[1]
        and a[0] <= b[0]
        and (writes_a & (reads_b | writes_b) or reads_a & writes_b or (a[0] < b[0] and (shared[a[0]] or shared[b[0]])))
    )


class _Holder:
    """Carries a Program past the cache: only its regions are part of the key, not its waits."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Holder)


def conflicts(sound: Program) -> frozenset[tuple[Task, Task]]:
    """Pairs (earlier or same phase, later phase) of tasks of different workers that touch the same coordinate, or may,
    as units change hands."""
    key = tuple((phase.op, phase.layer, phase.matrix, phase.spans, phase.fold, phase.to) for phase in sound.phases)
    return _conflicts((*key, (sound.spec, sound.target)), _Holder(sound))


def goes_wrong(sound: Program) -> bool:
    """Whether some interleaving lets conflicting tasks meet or never ends, with the head or without."""
    return any(_search(sound, n_phases) for n_phases in (len(sound.phases), sound.head_begin))


def _search(sound: Program, n_phases: int) -> bool:
    clashing, workers = conflicts(sound), range(sound.target.n_workers)
    seen: set[State] = set()
    todo: list[State] = [(0,) * len(workers)]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        running = [w for w in workers if state[w] < n_phases and sound.phases[state[w]].waits[w] <= sum(state)]
        if not running and sum(state) < len(workers) * n_phases:
            return True
        for w in running:
            p = state[w]
            unfinished = ((q, v) for v in workers if v != w for q in range(state[v], p + 1))
            if any((task, (p, w)) in clashing for task in unfinished):
                return True
            todo.append((*state[:w], p + 1, *state[w + 1 :]))
    return False


def wait_mutants(sound: Program) -> Iterator[tuple[int, int, int, Program]]:
    """(phase, worker, new wait, mutant): each wait removed, and each made one smaller."""
    for p, phase in enumerate(sound.phases):
        for w, wait in enumerate(phase.waits):
            for smaller in sorted({0, wait - 1}) if wait else ():
                yield p, w, smaller, with_wait(sound, p, w, smaller)
