"""The checker, tested by damaging sound Programs: every mutant is found, or harmless for a reason that is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from programs import conflicts, goes_wrong, program, spec, uneven, wait_mutants, with_deal, with_phase, with_wait

from flashformer.check import findings
from flashformer.model.spec import QkNorm
from flashformer.program import Program
from flashformer.program.ir import Fold, Op, Order, Space, Span, Vector
from flashformer.program.tape import make_tapes

SHAPES = {
    "one-layer": spec(),
    "two-layers-biases": spec(n_layers=2, d_model=144, d_ff=40, n_heads=3, n_kv_heads=1, head_dim=16, bias=True),
    "tied": spec(d_model=80, vocab_size=40, tied=True),
    "norms-after": spec(n_layers=2, pre_norm=False, post_norm=True, qk_norm=QkNorm.WIDTH),
    "norms-around": spec(n_layers=2, post_norm=True, qk_norm=QkNorm.HEAD, window=5, tied=True),
}
WORKERS = (1, 2, 3, 4, 5)

cases = pytest.mark.parametrize(
    ("shape", "n_workers"), [(shape, n) for shape in SHAPES for n in WORKERS], ids=lambda value: str(value)
)


def nothing_to_hand_over(sound: Program, p: int, w: int) -> bool:
    """Under full barriers, what a smaller wait of worker w before phase p lets meet.

    Worker w has finished p - 1 itself, so one other worker v may still be in it. The arrival of w at the end of p
    then stands in for that of v and lets the rest into p too. So the wait is idle if and only if no task of phase
    p - 1 but w's own conflicts with another worker's in phase p.
    """
    workers = range(sound.target.n_workers)
    clashing = conflicts(sound)
    return not any(((p - 1, v), (p, u)) in clashing for v in workers if v != w for u in workers)


@cases
def test_every_wait_is_needed_or_idle(shape: str, n_workers: int) -> None:
    sound = program(SHAPES[shape], n_workers)
    mutants = list(wait_mutants(sound))
    assert len(mutants) >= n_workers * (len(sound.phases) - 1)
    survivors = [(p, w, wait) for p, w, wait, mutant in mutants if not findings(mutant)]
    assert survivors == [(p, w, wait) for p, w, wait, mutant in mutants if not goes_wrong(mutant)]
    assert survivors == [(p, w, wait) for p, w, wait, _ in mutants if nothing_to_hand_over(sound, p, w)]
    if n_workers == 1:
        assert len(survivors) == len(mutants)  # one worker has nobody to wait for
    else:
        assert len(survivors) < len(mutants) / 4


@pytest.mark.parametrize("n_workers", [2, 3, 4])
def test_waits_changed_at_random_agree_with_every_interleaving(n_workers: int) -> None:
    rng = np.random.default_rng(n_workers)
    sound = program(SHAPES["one-layer"], n_workers)
    n_phases = len(sound.phases)
    verdicts = []
    for _ in range(150):
        mutant = sound
        for _ in range(int(rng.integers(1, 5))):
            p, w = int(rng.integers(n_phases)), int(rng.integers(n_workers))
            near = mutant.phases[p].waits[w] + int(rng.integers(-2, 3))
            wait = near if rng.random() < 0.7 else int(rng.integers(n_workers * n_phases + 1))
            mutant = with_wait(mutant, p, w, max(wait, 0))
        verdicts.append(goes_wrong(mutant))
        assert bool(findings(mutant)) == verdicts[-1], [phase.waits for phase in mutant.phases]
    assert 10 < sum(verdicts) < 140  # both verdicts occur


def span_mutants(sound: Program) -> Iterator[tuple[str, bool, Program]]:
    """(name, whether it is the same in other words, mutant): each end of each span moved by one.

    It is the same if its units are, and neither end lies outside the phase.
    """
    for p, phase in enumerate(sound.phases):
        for w, span in enumerate(phase.spans):
            for begin, end in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1)):
                moved = Span(span.begin + begin, span.end + end, span.step)
                spans = (*phase.spans[:w], moved, *phase.spans[w + 1 :])
                units = [list(range(s.begin, s.end, s.step)) for s in (span, moved)]
                same = units[0] == units[1] and min(moved.begin, moved.end) >= 0
                same = same and (not units[0] or moved.end <= phase.n_units)
                yield f"phase {p} worker {w} {span} -> {moved}", same, with_phase(sound, p, spans=spans)


@cases
def test_every_moved_span_is_found(shape: str, n_workers: int) -> None:
    mutants = list(span_mutants(program(SHAPES[shape], n_workers)))
    survivors = [name for name, _, mutant in mutants if not findings(mutant)]
    assert survivors == [name for name, same, _ in mutants if same]
    assert len(survivors) < len(mutants)


def test_every_moved_span_is_found_though_the_tape_follows() -> None:
    """The tape does not have to give the mutant away."""
    sound = program(SHAPES["two-layers-biases"], 3)
    for name, same, mutant in span_mutants(sound):
        inside = all(0 <= s.begin <= s.end <= ph.n_units for ph in mutant.phases if ph.matrix for s in ph.spans)
        if inside and not same:
            follows = dataclasses.replace(mutant, tapes=make_tapes(mutant.phases, 3))
            assert findings(follows), name


def tape_mutants(sound: Program) -> Iterator[tuple[str, Program]]:
    def with_tape(worker: int, tape: list[Any]) -> Program:
        tapes = (*sound.tapes[:worker], tuple(tape), *sound.tapes[worker + 1 :])
        return dataclasses.replace(sound, tapes=tapes)

    for w, tape in enumerate(sound.tapes):
        for i, item in enumerate(tape):
            yield f"drop {w} {i}", with_tape(w, [*tape[:i], *tape[i + 1 :]])
            yield f"twice {w} {i}", with_tape(w, [*tape[: i + 1], *tape[i:]])
            for field in ("phase", "begin", "end"):
                moved = dataclasses.replace(item, **{field: getattr(item, field) + 1})
                yield f"{field} {w} {i}", with_tape(w, [*tape[:i], moved, *tape[i + 1 :]])
            if i:
                yield f"swap {w} {i}", with_tape(w, [*tape[: i - 1], item, tape[i - 1], *tape[i + 1 :]])


def memory_mutants(sound: Program) -> Iterator[tuple[str, Program]]:
    memory = sound.memory

    def with_memory(**changes: Any) -> Program:
        return dataclasses.replace(sound, memory=dataclasses.replace(memory, **changes))

    for field in ("weights_bytes", "kv_bytes", "scratch_bytes", "rope_bytes"):
        yield f"cut {field}", with_memory(**{field: getattr(memory, field) - 1})
    yield "cut buffers_bytes", with_memory(buffers_bytes=memory.buffers_bytes - 64)
    for i, buffer in enumerate(memory.buffers):
        changed = [(f"offset {by}", {"offset": buffer.offset + by}) for by in (-64, 64, 4)]
        for axis in range(len(buffer.shape)):
            shape = (*buffer.shape[:axis], buffer.shape[axis] - 1, *buffer.shape[axis + 1 :])
            changed.append((f"axis {axis}", {"shape": shape}))  # type: ignore[dict-item]
        for name, change in changed:
            moved = dataclasses.replace(buffer, **change)  # type: ignore[arg-type]
            yield f"{buffer.space} {name}", with_memory(buffers=(*memory.buffers[:i], moved, *memory.buffers[i + 1 :]))
        yield f"no {buffer.space}", with_memory(buffers=memory.buffers[:i] + memory.buffers[i + 1 :])


def matrix_mutants(sound: Program) -> Iterator[tuple[str, Program]]:
    for p, phase in enumerate(sound.phases):
        for kind in ("matrix", "norm", "bias", "q_norm", "k_norm"):
            placed: Any = getattr(phase, kind)
            if placed is None:
                continue
            fields = ("n_out", "k", "vectors", "n_tiles") if kind == "matrix" else ()
            changes = [(field, by) for field in fields for by in (-1, 1)]
            changes += [("offset", by) for by in (-64, 64, 1)]
            changes += [("length", -64)] if kind != "matrix" else []
            for field, by in changes:
                moved = dataclasses.replace(placed, **{field: getattr(placed, field) + by})
                yield f"phase {p} {kind} {field} {by}", with_phase(sound, p, **{kind: moved})


def fold_mutants(sound: Program) -> Iterator[tuple[str, Program]]:
    """Branches that are folded in twice, never, from the wrong buffer, with a norm too short, or added too early."""
    for p, phase in enumerate(sound.phases):
        if phase.op in (Op.O_PROJ, Op.DOWN):
            for space in (Space.RESIDUAL, Space.ATTENTION_OUT, Space.FFN_OUT):
                if space is not phase.to:
                    yield f"phase {p} to {space}", with_phase(sound, p, to=space)
        if phase.fold is None:
            if phase.op in (Op.QKV, Op.O_PROJ, Op.GATE_UP, Op.DOWN, Op.LM_HEAD):
                norm = Vector((), 64, sound.memory.weights_bytes - 256)
                yield f"phase {p} folds", with_phase(sound, p, fold=Fold(Space.FFN_OUT, norm, 1e-5, 1.0))
            continue
        yield f"phase {p} does not fold", with_phase(sound, p, fold=None)
        other = Space.FFN_OUT if phase.fold.space is Space.ATTENTION_OUT else Space.ATTENTION_OUT
        yield f"phase {p} folds {other}", with_phase(sound, p, fold=dataclasses.replace(phase.fold, space=other))
        for field, value in (("scale", 0.5), ("norm_eps", 1e-3)):
            yield f"phase {p} {field}", with_phase(sound, p, fold=dataclasses.replace(phase.fold, **{field: value}))
        for by in (-64, 4, 10**9):
            norm = dataclasses.replace(phase.fold.norm, offset=phase.fold.norm.offset + by)
            yield f"phase {p} fold at {by}", with_phase(sound, p, fold=dataclasses.replace(phase.fold, norm=norm))
        short = dataclasses.replace(phase.fold.norm, length=phase.fold.norm.length - 64)
        yield f"phase {p} short norm", with_phase(sound, p, fold=dataclasses.replace(phase.fold, norm=short))


def model_mutants(sound: Program) -> Iterator[tuple[str, Program]]:
    """Phases with a tensor too few, with another's, or with another factor; models that no kernel computes."""
    for p, phase in enumerate(sound.phases):
        for kind in ("norm", "bias", "q_norm", "k_norm"):
            vector: Any = getattr(phase, kind)
            if vector is not None:
                yield f"phase {p} no {kind}", with_phase(sound, p, **{kind: None})
                other = dataclasses.replace(vector, roles=("layers.9.x",))
                yield f"phase {p} another {kind}", with_phase(sound, p, **{kind: other})
        yield f"phase {p} scale", with_phase(sound, p, scale=phase.scale * 7)
        yield f"phase {p} eps", with_phase(sound, p, norm_eps=phase.norm_eps + 1e-3)
        if phase.matrix is not None:
            roles = dataclasses.replace(phase.matrix, roles=(*phase.matrix.roles[::-1], "x"))
            yield f"phase {p} roles", with_phase(sound, p, matrix=roles)
            order = Order.PLAIN if phase.matrix.order is Order.ALTERNATE else Order.ALTERNATE
            yield f"phase {p} order", with_phase(sound, p, matrix=dataclasses.replace(phase.matrix, order=order))
    first, *rest = sound.spec.layers
    for change in ({"window": 0}, {"window": -5}, {"n_heads": 5}, {"head_dim": 13}, {"post_norm": not first.post_norm}):
        layers = (dataclasses.replace(first, **change), *rest)  # type: ignore[arg-type]
        yield str(change), dataclasses.replace(sound, spec=dataclasses.replace(sound.spec, layers=layers))
    for buffer in sound.memory.buffers:
        if buffer.space is Space.PARTIAL:
            wide = dataclasses.replace(buffer, shape=(buffer.shape[0], buffer.shape[1] + 64))
            buffers = tuple(wide if b is buffer else b for b in sound.memory.buffers)
            memory = dataclasses.replace(sound.memory, buffers=buffers, buffers_bytes=2 * sound.memory.buffers_bytes)
            yield "wide partials", dataclasses.replace(sound, memory=memory)


def whole_mutants(sound: Program) -> Iterator[tuple[str, Program]]:
    phases = sound.phases
    for p in range(len(phases)):
        yield f"drop phase {p}", dataclasses.replace(sound, phases=phases[:p] + phases[p + 1 :])
        if p:
            swapped = (*phases[: p - 1], phases[p], phases[p - 1], *phases[p + 1 :])
            yield f"swap phase {p}", dataclasses.replace(sound, phases=swapped)
        for by in (-1, 1):
            yield f"n_units {p} {by}", with_phase(sound, p, n_units=phases[p].n_units + by)
        yield f"layer {p}", with_phase(sound, p, layer=phases[p].layer + 1)
    for field in ("head_begin", "packed_bytes"):
        for by in (-1, 1):
            yield f"{field} {by}", dataclasses.replace(sound, **{field: getattr(sound, field) + by})
    other_embedding = -1 if sound.embed_offset >= 0 else 0
    yield "embed_offset", dataclasses.replace(sound, embed_offset=other_embedding)
    for field, value in (("rows", 15), ("rows", 17), ("ctx", 513), ("streams", 2), ("streams", 0), ("n_workers", 9)):
        target = dataclasses.replace(sound.target, **{field: value})  # type: ignore[arg-type]
        yield f"{field} {value}", dataclasses.replace(sound, target=target)


@pytest.mark.parametrize(
    "mutants", [tape_mutants, memory_mutants, matrix_mutants, fold_mutants, model_mutants, whole_mutants]
)
@cases
def test_every_other_mutant_is_found(
    shape: str, n_workers: int, mutants: Callable[[Program], Iterator[tuple[str, Program]]]
) -> None:
    damaged = list(mutants(program(SHAPES[shape], n_workers)))
    assert len(damaged) > 5
    assert [name for name, mutant in damaged if not findings(mutant)] == []


def unbalanced(mutant: Program) -> list[str]:
    """What balance says of a Program in which the other rules find nothing."""
    found = findings(mutant)
    assert {finding.rule for finding in found} <= {"balance"}
    return [finding.message for finding in found]


def test_one_worker_with_all_tiles_is_found() -> None:
    mutant = program(spec(d_model=512, d_ff=1024, vocab_size=2000), 4)
    for p, phase in enumerate(mutant.phases):
        mutant = with_deal(mutant, p, (0, phase.n_units, 0, 0)) if phase.matrix else mutant
    more = "phase 1 (qkv, layer 0): worker 1 has read 114688 bytes more than worker 0"  # 7 tiles of 16384 bytes
    assert unbalanced(mutant)[:3] == [
        "phase 1 (qkv, layer 0): worker 1 reads 114688 bytes, expected at most 32768",
        f"{more}, which has room, expected at most one tile, 16384",
        f"{more}, expected at most one tile, 16384",
    ]


def test_every_moved_tile_is_found_unless_it_is_as_well_there() -> None:
    verdicts = []
    for model in (SHAPES["one-layer"], SHAPES["tied"], spec(n_layers=2, d_model=176, d_ff=400, vocab_size=500)):
        for n_workers in WORKERS[1:]:
            sound = program(model, n_workers)
            for p, phase in enumerate(sound.phases):
                counts = [len(span) for span in phase.spans] if phase.matrix else []
                for a, b in permutations(range(len(counts)), 2):
                    if counts[a]:
                        moved = with_deal(sound, p, [n - (w == a) + (w == b) for w, n in enumerate(counts)])
                        messages, expected = unbalanced(moved), uneven(moved)
                        assert bool(messages) == bool(expected), (p, counts, a, b)
                        assert all(any(f"phase {q} " in message for message in messages) for q in expected)
                        verdicts.append(bool(expected))
    assert len(verdicts) > 500
    assert 0.5 < sum(verdicts) / len(verdicts) < 1


def test_what_is_owed_is_not_repaid_in_one_phase() -> None:
    """Bytes are as level as they can be, but all wait for the worker that has the small tiles of a phase to itself."""
    mutant = program(spec(n_layers=3, d_model=112, d_ff=1000, vocab_size=500), 5)
    totals, expected = [0] * 5, []
    for p, phase in enumerate(mutant.phases):
        if phase.matrix is None:
            continue
        counts = [0] * 5
        for _ in range(phase.n_units):
            least = min(range(5), key=totals.__getitem__)
            counts[least] += 1
            totals[least] += phase.matrix.tile_bytes
        mutant = with_deal(mutant, p, counts)
        expected += [p] if max(counts) > -(-phase.n_units // 5) else []
    found = unbalanced(mutant)
    assert len(expected) > 4
    assert [int(message.split()[1]) for message in found] == expected
    assert all(" reads " in message for message in found)
