"""Bounds: every span, tile, vector and buffer lies inside what holds it, aligned, and nothing overlaps.

The other rules index arrays with the numbers examined here, so they run only when this one finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ..model.spec import MAX_HEAD_DIM, QkNorm
from ..program.ir import LANES, MAX_HEAD_ROWS, Layout, Op, Order, PackedMatrix, Phase, Program, Space
from ..program.memory import (
    branches,
    head_dim_padded,
    input_stride,
    layer_kv_elements,
    merges,
    rope_offsets,
    scratch_bytes,
)
from ..program.ops import EMBED_BLOCK, OPS, attend_units, is_shared, n_chunks, qkv_width
from ..program.pack import row_map
from .facts import Finding, phase_name, task_name

RULE = "bounds"
ALIGNMENT = 64  # bytes: a cache line, and the widest vector
TILE_VECTORS = {Layout.LANES: (1, 2, 4), Layout.FRAGMENTS: (1,)}
MAX_STREAMS = 16


@dataclass(frozen=True)
class Range:
    """Bytes [begin, end) of one region of memory."""

    name: str
    begin: int
    end: int


def bounds(program: Program) -> tuple[list[Finding], dict[str, int]]:
    """Findings, and how many spans and byte ranges were proved."""
    messages = [*_target(program), *_spans(program)]
    if not messages:
        messages = [*_matrices(program), *_vectors(program)]
        messages += [*_weights(program), *_buffers(program), *_sizes(program)]
    n_ranges = len(program.phases) * program.target.n_workers + len(_weight_ranges(program))
    n_ranges += len(program.memory.buffers)
    return [Finding(RULE, message) for message in messages], {"bounds": n_ranges}


def _target(program: Program) -> Iterator[str]:
    target = program.target
    for name, value, least in (
        ("n_workers", target.n_workers, 1),
        ("rows", target.rows, MAX_HEAD_ROWS),
        ("streams", target.streams, 1),
        ("ctx", target.ctx, 1),
    ):
        if value < least:
            yield f"{name} is {value}, expected at least {least}"
    for index, layer in enumerate(program.spec.layers):
        if layer.head_dim % 2 or not 2 <= layer.head_dim <= MAX_HEAD_DIM:
            yield f"layer {index}: head_dim is {layer.head_dim}, expected an even number up to {MAX_HEAD_DIM}"
        if layer.window is not None and layer.window < 1:
            yield f"layer {index}: window is {layer.window}, expected at least 1"
        if not 1 <= layer.n_kv_heads <= layer.n_heads or layer.n_heads % layer.n_kv_heads:
            yield f"layer {index}: {layer.n_heads} heads over {layer.n_kv_heads} of keys, expected a multiple"
        if layer.rope and (layer.rope.rotary_dim % 2 or not 2 <= layer.rope.rotary_dim <= layer.head_dim):
            yield f"layer {index}: rotary_dim is {layer.rope.rotary_dim}, expected an even number up to head_dim"
    if target.streams > MAX_STREAMS:
        yield f"streams is {target.streams}, expected at most {MAX_STREAMS}"
    if len(program.tapes) != target.n_workers:
        yield f"{len(program.tapes)} tapes for {target.n_workers} workers"
    if not 0 <= program.head_begin <= len(program.phases):
        yield f"head_begin is {program.head_begin}, expected 0 to {len(program.phases)}"


def _spans(program: Program) -> Iterator[str]:
    n_workers, n_layers = program.target.n_workers, program.spec.n_layers
    for index, phase in enumerate(program.phases):
        name = phase_name(program, index)
        outside = phase.op in (Op.EMBED, Op.LM_HEAD, Op.SAMPLE)
        if phase.layer != -1 if outside else not 0 <= phase.layer < n_layers:
            yield f"{name}: layer is {phase.layer}, expected {-1 if outside else f'0 to {n_layers - 1}'}"
            continue
        if OPS[phase.op].has_matrix != (phase.matrix is not None):
            yield f"{name}: {'has' if phase.matrix else 'lacks'} a matrix, against the op table"
            continue
        if phase.n_units != (units := _units(program, phase)):
            yield f"{name}: has {phase.n_units} units, expected {units}"
        if not len(phase.spans) == len(phase.waits) == n_workers:
            yield f"{name}: {len(phase.spans)} spans and {len(phase.waits)} waits for {n_workers} workers"
            continue
        cyclic = phase.op is Op.ATTEND and is_shared(program, phase)  # others count what they take over likewise
        for worker, span in enumerate(phase.spans):
            task = task_name(program, index, worker)
            if phase.waits[worker] < 0:
                yield f"{task}: waits for {phase.waits[worker]} arrivals"
            if span.step < 1 or (phase.matrix and span.step != 1):
                yield f"{task}: step {span.step}, expected {'1, for one byte range' if phase.matrix else 'at least 1'}"
            elif min(span.begin, span.end) < 0 or (len(span) and span.end > phase.n_units):
                yield f"{task}: units [{span.begin}, {span.end}) of {phase.n_units}"
            elif cyclic and len(span) and (span.step != n_workers or span.begin >= n_workers):
                every = f"every {span.step}th unit from {span.begin}"
                yield f"{task}: {every}, expected every {n_workers}th from below it"


def _units(program: Program, phase: Phase) -> int:
    if phase.matrix is not None:
        return phase.matrix.n_tiles
    match phase.op:
        case Op.EMBED:
            return -(-program.spec.d_model // EMBED_BLOCK)
        case Op.ATTEND:
            return attend_units(program.spec.layers[phase.layer], program.target)
        case _:
            return MAX_HEAD_ROWS


def _shape(program: Program, phase: Phase) -> tuple[int, int]:
    """(n_out, k) of the matrix of a phase, as the model has it."""
    d_model = program.spec.d_model
    if phase.op is Op.LM_HEAD:
        return program.spec.vocab_size, d_model
    layer = program.spec.layers[phase.layer]
    return {
        Op.QKV: (qkv_width(layer), d_model),
        Op.O_PROJ: (d_model, layer.q_width),
        Op.GATE_UP: (2 * layer.d_ff, d_model),
        Op.DOWN: (d_model, layer.d_ff),
    }[phase.op]


def _matrices(program: Program) -> Iterator[str]:
    for index, phase in enumerate(program.phases):
        matrix = phase.matrix
        if matrix is None:
            continue
        name = phase_name(program, index)
        if (matrix.n_out, matrix.k) != (shape := _shape(program, phase)):
            yield f"{name}: matrix is {matrix.n_out} x {matrix.k}, expected {shape[0]} x {shape[1]}"
        head = phase.op is Op.LM_HEAD
        if matrix.format != (wanted := program.target.head_format if head else program.target.body_format):
            yield f"{name}: weights in {matrix.format.name}, expected {wanted.name}"
        if matrix.layout is not program.target.layout:
            yield f"{name}: laid out in {matrix.layout.value}, expected {program.target.layout.value}"
        lanes = matrix.layout is Layout.LANES
        if matrix.vectors not in (allowed := TILE_VECTORS[matrix.layout]):
            yield f"{name}: {matrix.vectors} vectors per tile, expected one of {allowed}"
        if lanes and matrix.k_padded > input_stride(program.spec):
            yield f"{name}: rows of {matrix.k_padded} elements, but inputs lie {input_stride(program.spec)} apart"
        if lanes and phase.op is Op.GATE_UP and matrix.vectors % 2:
            yield f"{name}: {matrix.vectors} vectors per tile, expected an even number: gate beside up"
        if matrix.order is not (order := Order.ALTERNATE if phase.op is Op.GATE_UP else Order.PLAIN):
            yield f"{name}: outputs in order {matrix.order.value}, expected {order.value}"
        elif matrix.n_tiles * matrix.tile_outputs < matrix.n_out:
            yield f"{name}: {matrix.n_tiles} tiles of {matrix.tile_outputs} outputs for {matrix.n_out} rows"
        else:
            yield from _row_map(name, matrix)


def _vectors(program: Program) -> Iterator[str]:
    """Each vector is as long as what it is applied to."""
    for index, phase in enumerate(program.phases):
        matrix, layer = phase.matrix, program.spec.layers[max(phase.layer, 0)]
        heads = layer.qk_norm is QkNorm.WIDTH
        needed = {
            "norm": matrix.k if matrix else 0,
            "bias": matrix.n_tiles * matrix.tile_outputs if matrix else 0,
            "q_norm": layer.q_width if heads else layer.head_dim,
            "k_norm": layer.kv_width if heads else layer.head_dim,
            "fold": program.spec.d_model,
        }
        for name, vector in phase.vectors.items():
            if vector.length < needed[name]:
                yield f"{phase_name(program, index)}: {name} of {vector.length} floats for {needed[name]}"


def _row_map(name: str, matrix: PackedMatrix) -> Iterator[str]:
    rows, n_packed = row_map(matrix), matrix.n_tiles * matrix.tile_outputs
    if len(rows) != n_packed:
        yield f"{name}: row map of {len(rows)} entries for {n_packed} packed outputs"
    elif rows.min() < -1 or rows.max() >= matrix.n_out:
        yield f"{name}: row map from {rows.min()} to {rows.max()}, expected -1 to {matrix.n_out - 1}"


def _weight_ranges(program: Program) -> list[Range]:
    """Everything that lies in the weights: tiles, embedding rows, norms and biases."""
    ranges = []
    for index, phase in enumerate(program.phases):
        name = phase_name(program, index)
        if phase.matrix is not None:
            ranges.append(Range(f"{name} tiles", phase.matrix.offset, phase.matrix.offset + phase.matrix.n_bytes))
        for kind, vector in phase.vectors.items():
            if kind != "fold" or phase.op in (Op.O_PROJ, Op.DOWN, Op.LM_HEAD):  # qkv and gate_up fold the same
                ranges.append(Range(f"{name} {kind}", vector.offset, vector.offset + 4 * vector.length))
    if not program.spec.tied:
        n_bytes = program.spec.vocab_size * program.spec.d_model * program.target.weight_format.element_bytes
        ranges.append(Range("embedding rows", program.embed_offset, program.embed_offset + n_bytes))
    return ranges


def _weights(program: Program) -> Iterator[str]:
    ranges = _weight_ranges(program)
    yield from _placed(ranges, program.memory.weights_bytes, "the weights")
    tiles = [r for r in ranges if r.name.endswith("tiles")]
    if tiles and -(-max(r.end for r in tiles) // ALIGNMENT) * ALIGNMENT != program.packed_bytes:
        yield f"packed_bytes is {program.packed_bytes}, but the tiles end at {max(r.end for r in tiles)}"
    for found in ranges:
        if found not in tiles and found.begin < program.packed_bytes:
            yield f"{found.name} at {found.begin} lies among the tiles, which end at {program.packed_bytes}"
    if program.spec.tied and program.embed_offset != -1:
        yield f"embed_offset is {program.embed_offset}, expected -1: the embedding is tied"


def _placed(ranges: list[Range], size: int, where: str) -> Iterator[str]:
    """Aligned, inside [0, size), and disjoint."""
    for found in ranges:
        if found.begin % ALIGNMENT:
            yield f"{found.name} begins at byte {found.begin} of {where}, expected a multiple of {ALIGNMENT}"
        if found.begin < 0 or found.end > size:
            yield f"{found.name} at [{found.begin}, {found.end}) lies outside {where}, {size} bytes"
    ordered = sorted(ranges, key=lambda r: r.begin)
    for a, b in pairwise(ordered):
        if b.begin < a.end:
            yield f"{a.name} [{a.begin}, {a.end}) and {b.name} [{b.begin}, {b.end}) overlap in {where}"


def _buffers(program: Program) -> Iterator[str]:
    """Each buffer is there once and holds what the ops write, whole tiles included."""
    target, memory = program.target, program.memory
    found = {buffer.space: buffer for buffer in memory.buffers}
    needed = _needed(program)
    if len(memory.buffers) != len(found) or set(found) != set(needed):
        names = [buffer.space.value for buffer in memory.buffers]
        yield f"buffers are {', '.join(names)}, expected {', '.join(space.value for space in needed)} once each"
        return
    for space, (count, width, element_bytes, whole) in needed.items():
        buffer = found[space]
        stride, rest = buffer.shape[-1], buffer.n_bytes // (buffer.shape[-1] * buffer.element_bytes or 1)
        if rest < count or stride < width or buffer.element_bytes < element_bytes:
            yield (
                f"buffer {space.value} holds {rest} x {stride} elements of {buffer.element_bytes} bytes, "
                f"expected at least {count} x {width} of {element_bytes}"
            )
        extra = 2 if space is Space.PARTIAL else 0  # the maximum and the sum follow whole vectors
        if (stride - extra) % whole:
            yield f"buffer {space.value} has {stride} elements per row, expected a multiple of {whole} plus {extra}"
        if space is Space.PARTIAL and stride != (heads := _widest_head(program) + extra):
            yield f"buffer {space.value} has {stride} elements per row, expected {heads}: scratch is laid out by it"
    ranges = [Range(f"buffer {b.space.value}", b.offset, b.offset + b.n_bytes) for b in memory.buffers]
    behind = memory.rope_bytes + memory.scratch_bytes * target.n_workers
    yield from _placed(ranges, memory.buffers_bytes - behind, "the arena before rope table and scratch")


def _widest_head(program: Program) -> int:
    return max(head_dim_padded(layer, program.target.layout) for layer in program.spec.layers)


def _needed(program: Program) -> dict[Space, tuple[int, int, int, int]]:
    """(rows, elements per row, bytes per element, multiple that a row's length must be) of each buffer.

    Products write whole tiles, padding included. Rows of activations begin at aligned addresses.
    """
    target, layers = program.target, program.spec.layers
    outputs: dict[Op, int] = {Op.EMBED: -(-program.spec.d_model // EMBED_BLOCK) * EMBED_BLOCK}
    for phase in program.phases:
        if phase.matrix is not None:
            width = phase.matrix.n_tiles * phase.matrix.tile_outputs
            outputs[phase.op] = max(outputs.get(phase.op, 0), width)
    aligned = ALIGNMENT // 4
    partials = target.rows * max(layer.n_heads for layer in layers) * n_chunks(target.ctx)
    residual = max(outputs.get(op, 0) for op in (Op.EMBED, Op.O_PROJ, Op.DOWN))
    return {
        Space.RESIDUAL: (target.rows, residual, 4, aligned),
        Space.QKV: (target.rows, outputs.get(Op.QKV, 0), 4, aligned),
        **{space: (target.rows, residual, 4, aligned) for space in branches(program.spec)},
        Space.PARTIAL: (partials, max(layer.head_dim for layer in layers) + 2, 4, LANES),
        Space.HIDDEN: (target.rows, outputs.get(Op.GATE_UP, 0) // 2, 4, aligned),
        Space.LOGITS: (MAX_HEAD_ROWS, outputs.get(Op.LM_HEAD, 0), 4, aligned),
        Space.CANDIDATES: (target.n_workers, MAX_HEAD_ROWS, 8, 1),
        Space.TOKENS: (1, MAX_HEAD_ROWS, 4, 1),
        **{space: (*shape, element_bytes, 1) for space, shape, element_bytes in merges(program.spec, target)},
    }


def _sizes(program: Program) -> Iterator[str]:
    """KV cache, scratch and rope table hold what their layouts say."""
    spec, target, memory = program.spec, program.target, program.memory
    elements = sum(sum(layer_kv_elements(layer, target)) for layer in spec.layers)
    _, rope = rope_offsets(spec, target.ctx)
    for name, found, least in (
        ("kv_bytes", memory.kv_bytes, elements * target.kv_format.element_bytes),
        ("scratch_bytes", memory.scratch_bytes, scratch_bytes(spec, target)),
        ("rope_bytes", memory.rope_bytes, rope),
    ):
        if found < least:
            yield (
                f"{name} is {found}, expected at least {least} for {target.streams} streams of {target.ctx} "
                f"positions and {target.rows} rows"
            )
    for name, found in (("scratch_bytes", memory.scratch_bytes), ("rope_bytes", memory.rope_bytes)):
        if found % ALIGNMENT:
            yield f"{name} is {found}, expected a multiple of {ALIGNMENT}: workers' scratch lies behind it"
