"""The proof of sound Programs, what it says about unsound ones, and its scale. Mutants are in test_mutants.py."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import conflicts, goes_wrong, program, spec, uneven, wait_mutants, with_phase, with_wait

from flashformer.check import CheckedProgram, check, findings
from flashformer.check.arrivals import schedule
from flashformer.check.balance import balance
from flashformer.errors import ProgramError
from flashformer.formats import BF16, F32, find_quant
from flashformer.model import shape_names
from flashformer.model.outline import read_outline
from flashformer.program import Target, build
from flashformer.program.ir import Layout, Op, Space, Span
from flashformer.program.ops import OPS, written_extent

GPUS = (78, 108, 132, 148)  # multiprocessors


@settings(max_examples=60)
@given(
    st.builds(
        lambda groups, kv_heads, half, **widths: spec(
            n_heads=groups * kv_heads, n_kv_heads=kv_heads, head_dim=2 * half, **widths
        ),
        groups=st.integers(1, 4),
        kv_heads=st.integers(1, 3),
        half=st.integers(1, 40),
        n_layers=st.integers(1, 3),
        d_model=st.integers(1, 400),
        d_ff=st.integers(1, 700),
        vocab_size=st.integers(1, 1500),
        bias=st.booleans(),
        tied=st.booleans(),
    ),
    st.integers(1, 40),
    st.sampled_from((F32, BF16)),
    st.integers(1, 700),
    st.integers(1, 16),
)
def test_built_programs_are_proved(model, n_workers, fmt, ctx, streams) -> None:  # type: ignore[no-untyped-def]
    assert findings(program(model, n_workers, fmt=fmt, ctx=ctx, streams=streams)) == []


def test_what_was_proved_is_counted() -> None:
    sound = program(spec(n_layers=2), 3)
    checked = check(sound)
    assert isinstance(checked, CheckedProgram)
    assert checked.program is sound
    n_phases = 13
    n_tiles = sum(phase.matrix.n_tiles for phase in sound.phases if phase.matrix)
    regions = sum(len(written_extent(sound, phase)) for phase in sound.phases)
    assert len(sound.phases) == n_phases
    assert checked.proved["tiles"] == n_tiles
    assert checked.proved["order"] == n_phases * (n_phases - 1) // 2 * 6 + n_phases * 3
    assert checked.proved["progress"] == 3 * (n_phases + n_phases - 2) + 2
    assert checked.proved["balance"] == 9
    assert regions <= checked.proved["coverage"] <= 3 * regions + 6  # qkv may straddle queries and KV


def test_the_search_in_these_tests_finds_nothing_in_sound_programs() -> None:
    for n_workers in (1, 2, 4):
        sound = program(spec(), n_workers)
        assert not goes_wrong(sound)
        assert (len(conflicts(sound)) > 0) == (n_workers > 1)


def test_missing_edge_is_named() -> None:
    sound = program(spec(n_layers=2), 3)
    mutant = with_wait(sound, 9, 1, 24)  # gate_up of layer 1, a phase early
    message = "\n".join(map(str, findings(mutant)))
    assert "order: phase 8 (o_proj, layer 1) worker 0 writes and phase 9 (gate_up, layer 1) worker 1 reads" in message
    assert "residual[0, 48): missing edge 8 -> 9: worker 1 enters phase 9 after 24 arrivals" in message
    assert "26 can be counted while worker 0 is still in phase 8; a wait of at least 27 is needed" in message
    with pytest.raises(ProgramError, match=r"failed its proof, \d+ findings:\n  order: phase 8") as caught:
        check(mutant)
    assert "please report it" in str(caught.value)


def test_overlap_within_a_phase_is_named() -> None:
    sound = program(spec(d_model=144), 3)
    down = sound.phases[5]
    spans = (Span(0, down.spans[0].end + 1), *down.spans[1:])
    message = "\n".join(map(str, findings(with_phase(sound, 5, spans=spans))))
    width = down.matrix.tile_outputs if down.matrix else 0
    first = down.spans[0].end * width
    assert f"coverage: phase 5 (down, layer 0): unit {down.spans[0].end} of {down.n_units} is executed by" in message
    assert f"residual[{first}] is written by worker 0 by [0, {first + width})" in message


def test_a_shared_phase_is_alone() -> None:
    sound = program(spec(n_layers=2), 2)
    attend, o_proj = 7, 8
    early = with_wait(sound, o_proj, 1, sound.phases[o_proj].waits[1] - 1)
    found = [finding.message for finding in findings(early) if finding.rule == "share"]
    assert len(found) == 1
    assert "worker 1 can be in phase 8 (o_proj, layer 1) while worker 0 is in phase 7 (attend, layer 1)" in found[0]
    assert f"units of phase {attend} (attend, layer 1) change hands; a wait of at least 16 is needed" in found[0]


def test_waits_that_only_spans_would_bear_are_found() -> None:
    """A worker without units of a phase need not be waited for, if nobody takes any over."""
    found = [{finding.rule for finding in findings(mutant)} for *_, mutant in wait_mutants(program(spec(), 5))]
    assert {"share"} in found
    assert {"order", "share"} in found


@pytest.mark.parametrize(
    "spans", [(Span(0, 4), Span(4, 8)), (Span(0, 8, 2), Span(1, 8, 4), Span(3, 8, 4))], ids=["halves", "steps"]
)
def test_units_of_attention_are_counted_alike(spans: tuple[Span, ...]) -> None:
    """Each unit once, but a worker that took some over would count them in another way."""
    one_kv_head = spec(n_heads=2, n_kv_heads=1)
    sound = program(one_kv_head, len(spans), ctx=2048)
    assert findings(sound) == []
    found = findings(with_phase(sound, 2, spans=spans))
    assert {finding.rule for finding in found} == {"bounds"}
    assert f"expected every {len(spans)}th from below it" in found[0].message


def test_units_that_touch_each_other_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two units of one worker, which the spans keep in order."""
    sound = program(spec(d_model=320, n_layers=2), 2)
    down = next(phase for phase in sound.phases if phase.op is Op.DOWN)
    assert min(len(span) for span in down.spans) > 1
    for kind in ("reads", "writes"):
        info = OPS[Op.DOWN]

        def wide(sound, phase, worker, info=info, kind=kind):  # type: ignore[no-untyped-def]
            """The last unit of all touches the one before as well, as long as one worker has both."""
            more = int(len(phase.spans) == phase.n_units and worker == phase.n_units - 1)
            return tuple(
                dataclasses.replace(r, begin=r.begin - more * (r.space is Space.RESIDUAL))
                for r in getattr(info, kind)(sound, phase, worker)
            )

        monkeypatch.setitem(OPS, Op.DOWN, dataclasses.replace(info, **{kind: wide}))
        found = [finding for finding in findings(sound) if finding.rule == "share"]
        assert len(found) == 1, kind  # one for both layers
        assert "phase 5 (down, layer 0)" in found[0].message
        monkeypatch.setitem(OPS, Op.DOWN, info)
    assert findings(sound) == []


def test_wait_that_nobody_can_satisfy_is_named() -> None:
    message = "\n".join(map(str, findings(with_wait(program(spec(), 3), 4, 2, 15))))
    assert (
        "progress: forward with the head: phase 4 (gate_up, layer 0) worker 2 waits for 15 arrivals, but only 14"
        in message
    )
    assert "the end waits for 24 arrivals, but 14 are counted" in message


def test_forward_without_the_head_is_proved_too() -> None:
    """A wait that only arrivals in the head can satisfy: workers 1 and 2 go ahead, worker 0 follows."""
    two = program(spec(), 2)
    n_phases, head = len(two.phases), two.head_begin
    waits = [(0, 0)] * head + [(0, 0)] * (n_phases - head)
    waits[head - 1] = (n_phases, 0)  # worker 0 enters the last phase before the head when worker 1 is past it
    phases = tuple(dataclasses.replace(p, waits=w) for p, w in zip(two.phases, waits, strict=True))
    assert schedule(phases).arrivals() == 2 * n_phases
    assert schedule(phases[:head]).arrivals() == 2 * head
    waits[head - 1] = (head - 1 + n_phases, 0)
    phases = tuple(dataclasses.replace(p, waits=w) for p, w in zip(two.phases, waits, strict=True))
    assert schedule(phases).arrivals() == 2 * n_phases
    assert schedule(phases[:head]).arrivals() == 2 * head - 1
    found = findings(dataclasses.replace(two, phases=phases))
    progress = [finding.message for finding in found if finding.rule == "progress"]
    assert any("forward without the head: phase 5 (down, layer 0) worker 0" in message for message in progress)
    assert not any("forward with the head" in message for message in progress)


@pytest.mark.parametrize("n_workers", [1, 2, 3, 4, *GPUS])
@pytest.mark.parametrize("shape", shape_names())
def test_balance_of_real_shapes(shape: str, n_workers: int) -> None:
    """Recomputed from the tapes: no tile would be better with another worker, and totals agree within one tile."""
    layout = Layout.FRAGMENTS if n_workers in GPUS else Layout.LANES
    model = read_outline(f"shape:{shape}").spec
    model = dataclasses.replace(model, layers=model.layers[:6])
    for names in (("none", "none"), ("int8-g32", "int8-g32"), ("int4-g32-zp", "none")):
        body, head = map(find_quant, names)
        sound = build(model, Target(n_workers, BF16, BF16, 16, 1, 512, False, body, head, layout))
        found, proved = balance(sound)
        assert found == [], names
        assert proved["balance"] == 25
        assert uneven(sound) == []
        for end in (sound.head_begin, len(sound.phases)):
            items = [[item.end - item.begin for item in tape if item.phase < end] for tape in sound.tapes]
            totals = [sum(item) for item in items]
            largest = max(phase.matrix.tile_bytes for phase in sound.phases[:end] if phase.matrix)
            assert max(totals) - min(totals) <= largest
            assert sum(totals) == sum(phase.matrix.n_bytes for phase in sound.phases[:end] if phase.matrix)


def test_tiles_of_llamas_on_an_h100() -> None:
    """Nobody has two tiles of a phase more than another, or reads more than 1.0012 times the mean of all."""
    for shape, qkv, o_proj, gate_up in (("llama-3.2-1b", 2, 1, 8), ("llama-3.1-8b", 3, 2, 14)):
        sound = build(read_outline(f"shape:{shape}").spec, Target(132, BF16, BF16, 16, 1, 512, layout=Layout.FRAGMENTS))
        most = {Op.QKV: qkv, Op.O_PROJ: o_proj, Op.GATE_UP: gate_up, Op.DOWN: o_proj, Op.LM_HEAD: 61}
        for phase in sound.phases:
            if phase.matrix:
                counts = [len(span) for span in phase.spans]
                assert (min(counts), max(counts)) == (most[phase.op] - 1, most[phase.op])
        totals = [sum(item.end - item.begin for item in tape) for tape in sound.tapes]
        assert max(totals) < 1.0012 * sum(totals) / len(totals)


@pytest.mark.parametrize(
    ("shape", "quant", "head"),
    [  # bytes of a head tile of 4 vectors: 262144, 133120, 73728, 114688, 58240, 73728
        ("llama-3.2-1b", "none", 4),
        ("llama-3.2-1b", "int8-g128", 2),
        ("llama-3.2-1b", "int4-g32", 4),
        ("qwen2.5-0.5b", "none", 2),
        ("qwen2.5-0.5b", "int8-g128", 4),
        ("smollm2-135m", "none", 4),
    ],
)
def test_head_tiles_of_real_shapes(shape: str, quant: str, head: int) -> None:
    """A head is narrower where that alone lets two tiles of it lie 56 to 96 KiB apart; layers never are."""
    model, fmt = read_outline(f"shape:{shape}").spec, find_quant(quant)
    built = build(model, Target(2, BF16, BF16, 16, 1, 512, False, fmt, fmt))
    vectors = {phase.op: phase.matrix.vectors for phase in built.phases if phase.matrix}
    assert vectors[Op.LM_HEAD] == head
    assert vectors[Op.GATE_UP] == 4


def test_scale() -> None:
    """32 layers on 132 workers: 163 phases, 21,516 tasks, 230 million pairs. Few runs of the counter prove them."""
    model = spec(n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336, vocab_size=128256)
    sound = program(model, 132, ctx=8192, streams=8)
    checked = check(sound)
    assert len(sound.phases) == 163
    assert checked.proved["order"] == 132 * 131 * 163**2 // 2
    plan = schedule(sound.phases)
    assert plan.levels.shape == (1, 163)  # all workers in one class: one run per phase
    late = with_wait(sound, 80, 131, sound.phases[80].waits[131] - 1)
    assert any(finding.rule == "order" and "worker 131" in finding.message for finding in findings(late))


def test_kv_regions_of_layers_are_apart() -> None:
    sound = program(spec(n_layers=3), 2)
    ranges = [written_extent(sound, phase).get(Space.KV) for phase in sound.phases]
    assert [r for r in ranges if r] == [(0, 4), (4, 8), (8, 12)]  # units of 2 heads and 512 / 256 chunks
