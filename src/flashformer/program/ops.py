"""The op table: for each op what a worker reads and writes when it executes a span, and what that costs.

A region is an interval of one buffer in that buffer's own coordinate:

    RESIDUAL    column of the residual                 [0, d_model)
    QKV         output of the qkv product              [0, q_width + 2 kv_width)
    KV          attention units of all layers before + attention unit: its chunk of one slot and kv head
    PARTIAL     attention unit                         [0, n_units)
    HIDDEN      column                                 [0, d_ff)
    *_OUT       column                                 [0, d_model)
    LOGITS      token id                               [0, vocab_size)
    CANDIDATES  worker                                 [0, n_workers)
    TOKENS      head row                               [0, MAX_HEAD_ROWS)

All rows of a forward are always meant. Units: a product's unit is a tile; embed's is a block of EMBED_BLOCK
columns; sample's is a head row (the i-th row that wants something); attend's is (chunk, group, kv head),
flattened as (chunk * n_groups + group) * n_kv_heads + kv_head, where a group is a run of rows of one slot and
n_groups counts those of the forward, at most `streams`. Within a forward groups and slots correspond one to one, so
a unit is also a piece of the KV cache that nobody else touches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..model.spec import LayerSpec
from .ir import KEY_CHUNK, LANES, MAX_HEAD_ROWS, Layout, Op, Phase, Program, Space, Span, Target

EMBED_BLOCK = 64


@dataclass(frozen=True)
class Region:
    """Coordinates begin, begin + step, ... below end of one buffer."""

    space: Space
    begin: int
    end: int
    step: int = 1


Regions = Callable[[Program, Phase, int], tuple[Region, ...]]  # of (program, phase, worker)


@dataclass(frozen=True)
class OpInfo:
    """`has_matrix`: the units are tiles of `phase.matrix`. `shares`: whoever is free may execute a unit, on a CPU."""

    op: Op
    code: int  # the number native code knows it by
    does: str
    has_matrix: bool
    shares: bool
    reads: Regions
    writes: Regions


def n_chunks(ctx: int) -> int:
    return -(-ctx // KEY_CHUNK)


def attend_units(layer: LayerSpec, target: Target) -> int:
    return n_chunks(target.ctx) * target.streams * layer.n_kv_heads


def _whole(space: Space, end: int) -> tuple[Region, ...]:
    return (Region(space, 0, end),)


def _clipped(space: Space, begin: int, end: int, limit: int) -> tuple[Region, ...]:
    return (Region(space, begin, min(end, limit)),) if begin < min(end, limit) else ()


def _layer(program: Program, phase: Phase) -> LayerSpec:
    return program.spec.layers[phase.layer]


def _outputs(phase: Phase, worker: int) -> tuple[int, int]:
    """Packed outputs [begin, end) of a worker's tiles."""
    assert phase.matrix is not None
    span, width = phase.spans[worker], phase.matrix.tile_outputs
    return (span.begin * width, span.end * width) if len(span) else (0, 0)


def _folded(program: Program, phase: Phase) -> tuple[Region, ...]:
    return _whole(phase.fold.space, program.spec.d_model) if phase.fold else ()


def _residual_all(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    return _whole(Space.RESIDUAL, program.spec.d_model) + _folded(program, phase)


def result_spaces(phase: Phase) -> tuple[Space, ...]:
    """What o_proj and down write: their result's place, and the residual if they add a fold to it."""
    return tuple(dict.fromkeys((*((Space.RESIDUAL,) if phase.fold else ()), phase.to)))


def _branch_reads(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    added_to = Space.RESIDUAL in result_spaces(phase)
    own = _clipped(Space.RESIDUAL, *_outputs(phase, worker), program.spec.d_model) if added_to else ()
    return own + _folded(program, phase)


def _branch_writes(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    outputs = _outputs(phase, worker)
    return tuple(r for space in result_spaces(phase) for r in _clipped(space, *outputs, program.spec.d_model))


def _nothing(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    return ()


def _embed_writes(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    span: Span = phase.spans[worker]
    return _clipped(Space.RESIDUAL, span.begin * EMBED_BLOCK, span.end * EMBED_BLOCK, program.spec.d_model)


def kv_base(program: Program, layer: int) -> int:
    return sum(attend_units(spec, program.target) for spec in program.spec.layers[:layer])


def qkv_width(layer: LayerSpec) -> int:
    return layer.q_width + 2 * layer.kv_width


def _qkv_writes(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    return _clipped(Space.QKV, *_outputs(phase, worker), qkv_width(_layer(program, phase)))


def _kv_units(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    base, span = kv_base(program, phase.layer), phase.spans[worker]
    return (Region(Space.KV, base + span.begin, base + span.end, span.step),) if len(span) else ()


def _attend_reads(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    return _whole(Space.QKV, qkv_width(_layer(program, phase))) + _kv_units(program, phase, worker)


def _attend_writes(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    span = phase.spans[worker]
    partial = (Region(Space.PARTIAL, span.begin, span.end, span.step),) if len(span) else ()
    return partial + _kv_units(program, phase, worker)


def _o_proj_reads(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    units = attend_units(_layer(program, phase), program.target)
    return _whole(Space.PARTIAL, units) + _branch_reads(program, phase, worker)


def _gate_up_writes(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    begin, end = _outputs(phase, worker)
    return _clipped(Space.HIDDEN, begin // 2, end // 2, _layer(program, phase).d_ff)


def _down_reads(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    return _whole(Space.HIDDEN, _layer(program, phase).d_ff) + _branch_reads(program, phase, worker)


def _lm_head_writes(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    logits = _clipped(Space.LOGITS, *_outputs(phase, worker), program.spec.vocab_size)
    return (*logits, Region(Space.CANDIDATES, worker, worker + 1))


def _sample_reads(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    return _whole(Space.CANDIDATES, program.target.n_workers) + _whole(Space.LOGITS, program.spec.vocab_size)


def _sample_writes(program: Program, phase: Phase, worker: int) -> tuple[Region, ...]:
    span = phase.spans[worker]
    return (Region(Space.TOKENS, span.begin, span.end, span.step),) if len(span) else ()


OPS = {
    info.op: info
    for info in (
        OpInfo(Op.EMBED, 0, "embedding row -> residual", False, False, _nothing, _embed_writes),
        OpInfo(Op.QKV, 1, "norm, q k v products, bias", True, True, _residual_all, _qkv_writes),
        OpInfo(
            Op.ATTEND,
            2,
            "q and k norm, rope, KV append; scores, exp, weighted values of one key chunk",
            False,
            True,
            _attend_reads,
            _attend_writes,
        ),
        OpInfo(Op.O_PROJ, 3, "merge chunks, product, residual +=", True, True, _o_proj_reads, _branch_writes),
        OpInfo(Op.GATE_UP, 4, "norm, gate and up products, activation", True, True, _residual_all, _gate_up_writes),
        OpInfo(Op.DOWN, 5, "product, residual +=", True, True, _down_reads, _branch_writes),
        OpInfo(Op.LM_HEAD, 6, "norm, product, best token of each worker", True, True, _residual_all, _lm_head_writes),
        OpInfo(
            Op.SAMPLE,
            7,
            "best token of all workers, or one chosen from the logits",
            False,
            False,
            _sample_reads,
            _sample_writes,
        ),
    )
}


# What csrc/share.h has room for; lists of attention's units have gaps.
MAX_SHARED = {"phases": 2**12 - 1, "workers": 2**8, "units": 2**21}


def is_shared(program: Program, phase: Phase) -> bool:
    """Whether a worker that is through executes units of others: in all phases of ops that share, or in none."""
    target, most = program.target, MAX_SHARED
    if not (OPS[phase.op].shares and target.layout is Layout.LANES and 1 < target.n_workers <= most["workers"]):
        return False
    return len(program.phases) <= most["phases"] and max(p.n_units for p in program.phases) <= most["units"]


def written_extent(program: Program, phase: Phase) -> dict[Space, tuple[int, int]]:
    """What all workers together must write: the interval of each buffer that the phase produces."""
    spec = program.spec
    match phase.op:
        case Op.EMBED:
            return {Space.RESIDUAL: (0, spec.d_model)}
        case Op.O_PROJ | Op.DOWN:
            return {space: (0, spec.d_model) for space in result_spaces(phase)}
        case Op.QKV:
            return {Space.QKV: (0, qkv_width(_layer(program, phase)))}
        case Op.ATTEND:
            units, base = attend_units(_layer(program, phase), program.target), kv_base(program, phase.layer)
            return {Space.PARTIAL: (0, units), Space.KV: (base, base + units)}
        case Op.GATE_UP:
            return {Space.HIDDEN: (0, _layer(program, phase).d_ff)}
        case Op.LM_HEAD:
            return {Space.LOGITS: (0, spec.vocab_size), Space.CANDIDATES: (0, program.target.n_workers)}
        case Op.SAMPLE:
            return {Space.TOKENS: (0, MAX_HEAD_ROWS)}


def bytes_read(phase: Phase, worker: int) -> int:
    """Packed-weight bytes that a worker reads in this phase."""
    return phase.matrix.tile_bytes * len(phase.spans[worker]) if phase.matrix else 0


assert EMBED_BLOCK % LANES == 0  # and rows are padded to it (VECTOR_PAD), so the last block covers the padding
