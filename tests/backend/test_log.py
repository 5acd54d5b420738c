"""What the kernel did, entry by entry, against the Program: native code holds no schedule of its own. Where units
change hands, nothing but who executes them may differ."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import pytest
from cpu_kernels import cpu_kernel, prefill, program_of
from odd_shapes import SHAPES, random_ids
from tiny import put

from flashformer.backends.base import Want
from flashformer.errors import NumericalError
from flashformer.formats import BF16, F32
from flashformer.program import Program
from flashformer.program.ir import KEY_CHUNK, Op
from flashformer.program.ops import OPS
from flashformer.program.records import FlatProgram, flatten

WAIT, UNIT, TAPE = 0, 1, 2
CAPACITY = 100_000
SHARED = {info.code for info in OPS.values() if info.shares}
Entry = tuple[int, int, int, int]


def expected_log(program: Program, worker: int, *, last_pos: int, head: bool) -> list[Entry]:
    """One forward of rows of one slot as the Program states it."""
    entries: list[Entry] = []
    items = iter(program.tapes[worker])
    for p, phase in enumerate(program.phases if head else program.phases[: program.head_begin]):
        entries.append((p, WAIT, phase.waits[worker], 0))
        span = phase.spans[worker]
        end = span.end
        if phase.matrix is not None and len(span):
            item = next(items)
            assert item.phase == p
            entries.append((p, TAPE, item.end - item.begin, item.begin))
        if phase.op is Op.ATTEND:  # chunks that no row has reached yet hold nothing
            per_chunk = program.spec.layers[phase.layer].n_kv_heads  # of the one group
            end = min(end, (last_pos // KEY_CHUNK + 1) * per_chunk)
        units = list(range(span.begin, end, span.step))
        if phase.op is Op.ATTEND:  # one head after the other, as the cache lies
            turn = math.lcm(per_chunk, span.step)
            units.sort(key=lambda unit: (unit - span.begin) % turn)
        entries += [(p, UNIT, unit, 0) for unit in units]
    return entries


def unshared(program: Program) -> FlatProgram:
    """Every worker executes its own span and nothing else."""
    flat = flatten(program)
    flat.model["shared"] = 0
    return flat


def changes_hands(flat: FlatProgram, entry: Entry) -> bool:
    return entry[1] == UNIT and flat.phases["op"][entry[0]] in SHARED


def changing(flat: FlatProgram, logs: list[list[Entry]]) -> list[Entry]:
    """The units that anybody may execute, of all workers."""
    return [e for log in logs for e in log if changes_hands(flat, e)]


def staying(flat: FlatProgram, logs: list[list[Entry]]) -> list[list[Entry]]:
    return [[e for e in log if not changes_hands(flat, e)] for log in logs]


@pytest.mark.parametrize("config", range(30))
def test_log_equals_program(config: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[config % len(SHAPES)]
    model = shape.make(config)
    weights, kv = ((F32, F32), (BF16, F32), (BF16, BF16))[config % 3]
    ids = random_ids(config, 5 + 11 * config, shape.vocab)
    for n_workers in (1, 2, 3, 4):
        target = {
            "n_workers": n_workers,
            "weights": weights,
            "kv": kv,
            "rows": 350,
            "streams": 1 + config % 4,
            "ctx": 400,
        }
        program = program_of(model, **target)
        for flat in (unshared(program), flatten(program)):
            shared = flat.model["shared"][0]
            monkeypatch.setenv("FLASHFORMER_DELAYS", str(config + 1) if shared else "0")
            options = {"flat": flat, "log_capacity": CAPACITY}
            with cpu_kernel(model, options=options, **target) as kernel:
                for head in (True, False):
                    kernel.clear_logs()
                    if head:
                        prefill(kernel, ids, chunk=len(ids))
                    else:
                        kernel.rows.want[:] = 0
                        kernel.forward(len(ids))
                    found = [kernel.log(worker) for worker in range(n_workers)]
                    expected = [
                        expected_log(program, worker, last_pos=len(ids) - 1, head=head) for worker in range(n_workers)
                    ]
                    if shared:
                        assert Counter(changing(flat, found)) == Counter(changing(flat, expected))
                        found, expected = staying(flat, found), staying(flat, expected)
                    assert found == expected


def logs_of(flat: FlatProgram, n_workers: int, *, damaged: bool = True) -> list[list[Entry]]:
    model = SHAPES[8].make(1)
    options = {"flat": flat, "log_capacity": CAPACITY}
    with cpu_kernel(model, n_workers=n_workers, weights=BF16, options=options) as kernel:
        with suppress(NumericalError) if damaged else nullcontext():  # without a hand-off numbers may be anything
            prefill(kernel, random_ids(1, 20, SHAPES[8].vocab), chunk=64)
        return [kernel.log(worker) for worker in range(n_workers)]


def test_log_follows_the_arrays() -> None:
    """Moving an interval or deleting a hand-off in the arrays shows in the log, where it was changed and only there."""
    model = SHAPES[8].make(1)
    program = program_of(model, n_workers=2, weights=BF16)
    sound = logs_of(unshared(program), 2, damaged=False)
    changed = 0
    for p, phase in enumerate(program.phases):
        if phase.matrix is not None and len(phase.spans[0]) > 1:
            moved = unshared(program)
            moved.schedule["end"][p, 0] -= 1
            moved.schedule["begin"][p, 1] -= 1
            size = phase.matrix.tile_bytes
            first = moved.tapes[: moved.tape_begin[1]]
            second = moved.tapes[moved.tape_begin[1] :]
            first["end"][first["phase"] == p] -= size
            second["begin"][second["phase"] == p] -= size
            found = logs_of(moved, 2)
            unit = phase.spans[1].begin - 1
            assert (p, UNIT, unit, 0) in sound[0]
            assert (p, UNIT, unit, 0) not in found[0]
            assert (p, UNIT, unit, 0) in found[1]
            assert [e for e in found[0] if e[0] != p] == [e for e in sound[0] if e[0] != p]
            changed += 1
        if p > 0:
            unguarded = unshared(program)
            unguarded.schedule["wait"][p, 1] = 0
            found = logs_of(unguarded, 2)
            assert found[0] == sound[0]
            assert [(a, b) for a, b in zip(sound[1], found[1], strict=True) if a != b] == [
                ((p, WAIT, 2 * p, 0), (p, WAIT, 0, 0))
            ]
            changed += 1
    assert changed > 15


@pytest.mark.parametrize("n_workers", [1, 2, 3, 5])
def test_windows_and_groups(n_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all slots in a forward: the chunks from the first that any row sees to the last, each once."""
    model = SHAPES[8].make(1)
    layers = tuple(replace(layer, window=300) for layer in model.spec.layers)
    model = replace(model, spec=replace(model.spec, layers=layers))
    heads, slots = layers[0].n_kv_heads, 2
    monkeypatch.setenv("FLASHFORMER_DELAYS", "9")
    target = {"n_workers": n_workers, "streams": 3, "ctx": 1500}
    with cpu_kernel(model, options={"log_capacity": CAPACITY}, **target) as kernel:
        put(kernel, 0, [1, 2], pos=700, slot=0, want=Want.TOKEN)
        put(kernel, 2, [3], pos=1300, slot=2, want=Want.TOKEN)
        kernel.forward(3)
        attend = [p for p, phase in enumerate(program_of(model, **target).phases) if phase.op is Op.ATTEND]
        found = Counter(
            (p, unit) for w in range(n_workers) for p, kind, unit, _ in kernel.log(w) if kind == UNIT and p in attend
        )
    first, end = (700 - 299) // KEY_CHUNK, 1300 // KEY_CHUNK + 1
    assert found == Counter((p, unit) for p in attend for unit in range(first * heads * slots, end * heads * slots))


def test_units_change_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of workers that stall at random one is late in some of 50 forwards, and others execute what it was dealt."""
    monkeypatch.setenv("FLASHFORMER_DELAYS", "7")
    model, moved = SHAPES[8].make(1), set()
    flat = flatten(program_of(model, n_workers=3, weights=BF16))
    with cpu_kernel(model, n_workers=3, weights=BF16, options={"log_capacity": CAPACITY}) as kernel:
        for _ in range(50):
            kernel.clear_logs()
            prefill(kernel, random_ids(1, 20, SHAPES[8].vocab), chunk=64)
            for worker in range(3):
                for p, kind, unit, _ in kernel.log(worker):
                    span = flat.schedule[p, worker]
                    if kind == UNIT and unit not in range(span["begin"], span["end"], span["step"]):
                        moved.add(int(flat.phases["op"][p]))
    assert moved <= SHARED
    assert OPS[Op.LM_HEAD].code in moved  # has most units
    assert len(moved) > 2


def test_log_too_small_is_an_error() -> None:
    with cpu_kernel(SHAPES[0].make(1), options={"log_capacity": 3}) as kernel:
        prefill(kernel, [1, 2, 3], chunk=64)
        with pytest.raises(OverflowError, match="too small"):
            kernel.log(0)


def test_flat_arrays_hold_the_program() -> None:
    program = program_of(SHAPES[8].make(1), n_workers=3)
    flat = flatten(program)
    for p, phase in enumerate(program.phases):
        for w, span in enumerate(phase.spans):
            assert flat.schedule[p, w].tolist() == (span.begin, span.end, span.step, phase.waits[w])
    assert np.array_equal(np.diff(flat.tape_begin), [len(tape) for tape in program.tapes])
