"""The Program as flat arrays, the only form in which native code sees it. csrc/generated/program.h mirrors this.

model     one MODEL record
phases    (n_phases) PHASE records
schedule  (n_phases, n_workers) SPAN records: the units of a worker and the arrivals it waits for
tapes     TAPE records of worker 0, then worker 1, ...; tape_begin (n_workers + 1) says where each starts
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..model.spec import MAX_HEAD_DIM, Activation, QkNorm
from . import fragments
from .ir import KEY_CHUNK, LANES, MAX_HEAD_ROWS, Buffer, Layout, Op, Phase, Program, Space
from .lower import VECTOR_PAD, padded
from .memory import (
    SCORE_ROWS,
    VALUES_TOGETHER,
    ctx_padded,
    group_stride,
    head_dim_padded,
    input_stride,
    layer_kv_elements,
    rope_offsets,
)
from .ops import EMBED_BLOCK, OPS, is_shared, n_chunks

MODEL = np.dtype(
    [
        (name, "<i8")
        for name in (
            "n_workers", "n_phases", "head_begin", "rows", "streams", "ctx", "ctx_padded", "chunks",
            "d_model", "d_model_stride", "qkv_stride", "hidden_stride", "vocab_size", "logits_stride",
            "n_heads_max", "partial_stride", "n_layers", "embed_format", "kv_format", "exact", "group_stride",
            "embed_offset", "embed_phase", "residual", "qkv", "partial", "hidden", "logits", "candidates",
            "tokens", "merges", "scratch", "scratch_bytes", "input_stride", "work_bytes", "shared",
        )
    ]
)  # fmt: skip

PHASE = np.dtype(
    [
        (name, "<i8")
        for name in (
            "op", "layer", "n_units", "matrix", "tile_bytes", "vectors", "k", "k_padded", "n_out",
            "format", "scale_group", "group_bytes", "zero_points", "zero",
            "norm", "bias", "fold", "fold_norm", "to", "activation",
            "n_heads", "n_kv_heads", "head_dim", "head_dim_padded", "window", "keys", "values",
            "rope", "rotary_dim", "qk_norm", "q_norm", "k_norm",
            "n_slices", "unit_k", "unit_bytes", "slot_units",
        )
    ]
    + [(name, "<f8") for name in ("norm_eps", "scale", "fold_eps", "fold_scale", "attention_scale", "softcap")]
)  # fmt: skip

SPAN = np.dtype([(name, "<i8") for name in ("begin", "end", "step", "wait")])
TAPE = np.dtype([(name, "<i8") for name in ("phase", "begin", "end")])
RECORDS = {"Model": MODEL, "Phase": PHASE, "Span": SPAN, "TapeItem": TAPE}

# The numbers native code knows them by. QkNorm 0: none.
ACTIVATIONS = {Activation.SILU: 0, Activation.GELU_TANH: 1}
QK_NORMS = {QkNorm.HEAD: 1, QkNorm.WIDTH: 2}


@dataclass(frozen=True)
class FlatProgram:
    model: NDArray[np.void]  # (1)
    phases: NDArray[np.void]  # (n_phases)
    schedule: NDArray[np.void]  # (n_phases, n_workers)
    tapes: NDArray[np.void]
    tape_begin: NDArray[np.int64]  # (n_workers + 1)


def flatten(program: Program) -> FlatProgram:
    """Copies a Program into records, entry by entry; decides nothing."""
    n_phases, n_workers = len(program.phases), program.target.n_workers
    phases, schedule = np.zeros(n_phases, PHASE), np.zeros((n_phases, n_workers), SPAN)
    kv_offsets = _kv_offsets(program)
    for p, phase in enumerate(program.phases):
        _phase_record(program, phase, phases[p])
        if phase.op is Op.ATTEND:
            phases[p]["keys"], phases[p]["values"] = kv_offsets[phase.layer]
        for w in range(n_workers):
            span = phase.spans[w]
            schedule[p, w] = (span.begin, span.end, span.step, phase.waits[w])
    items = [(item.phase, item.begin, item.end) for tape in program.tapes for item in tape]
    begins = np.cumsum([0] + [len(tape) for tape in program.tapes], dtype=np.int64)
    return FlatProgram(_model_record(program), phases, schedule, np.array(items, TAPE), begins)


def _phase_record(program: Program, phase: Phase, record: np.void) -> None:
    """Offsets that do not apply are -1; so is `to` where a result is added to the residual."""
    buffers = {b.space: b.offset for b in program.memory.buffers}
    record["op"], record["layer"], record["n_units"] = OPS[phase.op].code, phase.layer, phase.n_units
    record["norm_eps"], record["scale"] = phase.norm_eps, phase.scale
    for name in ("matrix", "norm", "bias", "q_norm", "k_norm"):
        placed = getattr(phase, name)
        record[name] = -1 if placed is None else placed.offset
    if (matrix := phase.matrix) is not None:
        for name in ("tile_bytes", "vectors", "k", "k_padded", "n_out"):
            record[name] = getattr(matrix, name)
        fmt = matrix.format
        record["format"], record["group_bytes"] = fmt.code, fmt.group_bytes(matrix.vectors)
        record["scale_group"], record["zero_points"], record["zero"] = fmt.scale_group, fmt.zero_points, fmt.zero
        record["n_slices"] = len(matrix.item_bytes)
        if matrix.layout is Layout.FRAGMENTS:
            record["unit_k"], record["unit_bytes"] = fragments.unit_k(fmt), fragments.unit_bytes(fmt)
            record["slot_units"] = fragments.slot_units(fmt)
    record["to"] = -1 if phase.to is Space.RESIDUAL else buffers[phase.to]
    record["fold"] = record["fold_norm"] = record["rope"] = -1
    if (fold := phase.fold) is not None:
        record["fold"], record["fold_norm"] = buffers[fold.space], fold.norm.offset
        record["fold_eps"], record["fold_scale"] = fold.norm_eps, fold.scale
    if phase.op is Op.LM_HEAD:
        record["softcap"] = program.spec.logits_softcap or 0
    if phase.layer >= 0:
        layer = program.spec.layers[phase.layer]
        for name in ("n_heads", "n_kv_heads", "head_dim", "attention_scale"):
            record[name] = getattr(layer, name)
        record["head_dim_padded"] = head_dim_padded(layer, program.target.layout)
        record["activation"] = ACTIVATIONS[layer.activation]
        record["window"], record["softcap"] = layer.window or program.target.ctx, layer.score_softcap or 0
        record["qk_norm"] = QK_NORMS[layer.qk_norm] if layer.qk_norm else 0
        if layer.rope is not None:
            offsets, _ = rope_offsets(program.spec, program.target.ctx)
            record["rope"], record["rotary_dim"] = rope_begin(program) + offsets[layer.rope], layer.rope.rotary_dim


def rope_begin(program: Program) -> int:
    """Where the buffers end and the rope tables begin in the work region; scratch follows."""
    return max(b.offset + -(-b.n_bytes // 64) * 64 for b in program.memory.buffers)


def _kv_offsets(program: Program) -> list[tuple[int, int]]:
    """Per layer: byte offsets in the KV cache of its keys and, where they lie behind all keys, its values."""
    offsets, end = [], 0
    target = program.target
    for layer in program.spec.layers:
        keys, values = layer_kv_elements(layer, target)
        size = target.kv_format.element_bytes
        offsets.append((end * size, (end + keys) * size if target.layout is Layout.FRAGMENTS else -1))
        end += keys + values
    return offsets


def _model_record(program: Program) -> NDArray[np.void]:
    spec, target, memory = program.spec, program.target, program.memory
    buffers: dict[Space, Buffer] = {b.space: b for b in memory.buffers}
    values = {
        "n_workers": target.n_workers,
        "n_phases": len(program.phases),
        "head_begin": program.head_begin,
        "rows": target.rows,
        "streams": target.streams,
        "ctx": target.ctx,
        "ctx_padded": ctx_padded(target),
        "chunks": n_chunks(target.ctx),
        "d_model": spec.d_model,
        "d_model_stride": padded(spec.d_model),
        "qkv_stride": buffers[Space.QKV].shape[1],
        "hidden_stride": buffers[Space.HIDDEN].shape[1],
        "vocab_size": spec.vocab_size,
        "logits_stride": buffers[Space.LOGITS].shape[1],
        "n_heads_max": max(layer.n_heads for layer in spec.layers),
        "partial_stride": buffers[Space.PARTIAL].shape[1] - 2,
        "n_layers": spec.n_layers,
        "embed_format": target.weight_format.code,
        "group_stride": group_stride(spec),
        "kv_format": target.kv_format.code,
        "exact": int(target.exact),
        "embed_offset": program.embed_offset,
        "embed_phase": program.head_begin,
        "scratch": rope_begin(program) + memory.rope_bytes,
        "scratch_bytes": memory.scratch_bytes,
        "input_stride": input_stride(spec),
        "work_bytes": memory.buffers_bytes,
        "shared": int(any(is_shared(program, phase) for phase in program.phases)),
        "merges": buffers[Space.MERGES].offset if Space.MERGES in buffers else -1,
    }
    for name in ("residual", "qkv", "partial", "hidden", "logits", "candidates", "tokens"):
        values[name] = buffers[Space(name)].offset
    record = np.zeros(1, MODEL)
    for name in MODEL.names or ():
        record[name] = values[name]
    return record


CONSTANTS = {
    "kLanes": LANES,
    "kKeyChunk": KEY_CHUNK,
    "kMaxHeadRows": MAX_HEAD_ROWS,
    "kEmbedBlock": EMBED_BLOCK,
    "kPad": VECTOR_PAD,
    "kScoreRows": SCORE_ROWS,
    "kValuesTogether": VALUES_TOGETHER,
    "kMaxHeadDim": MAX_HEAD_DIM,
}
