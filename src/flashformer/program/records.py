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

from ..model.spec import MAX_HEAD_DIM
from .ir import KEY_CHUNK, LANES, MAX_HEAD_ROWS, Buffer, Program, Space
from .lower import VECTOR_PAD, padded
from .memory import SCORE_ROWS, ctx_padded, head_dim_padded, input_stride, layer_kv_elements
from .ops import EMBED_BLOCK, OPS, n_chunks

MODEL = np.dtype(
    [
        (name, "<i8")
        for name in (
            "n_workers", "n_phases", "head_begin", "rows", "streams", "ctx", "ctx_padded", "chunks",
            "d_model", "d_model_stride", "query_stride", "hidden_stride", "vocab_size", "logits_stride",
            "n_heads_max", "partial_stride", "n_layers", "weight_format", "kv_format", "exact",
            "embed_offset", "embed_phase", "residual", "query", "partial", "hidden", "logits", "candidates",
            "tokens", "rope", "scratch", "scratch_bytes", "input_stride", "work_bytes",
        )
    ]
)  # fmt: skip

PHASE = np.dtype(
    [
        (name, "<i8")
        for name in (
            "op", "layer", "n_units", "matrix", "tile_bytes", "vectors", "k", "k_padded", "n_out",
            "norm", "bias", "n_heads", "n_kv_heads", "head_dim", "head_dim_padded", "d_ff", "keys", "values",
        )
    ]
    + [("norm_eps", "<f8"), ("attention_scale", "<f8")]
)  # fmt: skip

SPAN = np.dtype([(name, "<i8") for name in ("begin", "end", "step", "wait")])
TAPE = np.dtype([(name, "<i8") for name in ("phase", "begin", "end")])
RECORDS = {"Model": MODEL, "Phase": PHASE, "Span": SPAN, "TapeItem": TAPE}


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
        record = phases[p]
        record["op"], record["layer"], record["n_units"] = OPS[phase.op].code, phase.layer, phase.n_units
        record["matrix"] = record["norm"] = record["bias"] = -1
        if (matrix := phase.matrix) is not None:
            for name in ("tile_bytes", "vectors", "k", "k_padded", "n_out"):
                record[name] = getattr(matrix, name)
            record["matrix"] = matrix.offset
        if phase.norm is not None:
            record["norm"], record["norm_eps"] = phase.norm.offset, phase.norm_eps
        if phase.bias is not None:
            record["bias"] = phase.bias.offset
        if phase.layer >= 0:
            layer = program.spec.layers[phase.layer]
            for name in ("n_heads", "n_kv_heads", "head_dim", "d_ff", "attention_scale"):
                record[name] = getattr(layer, name)
            record["head_dim_padded"] = head_dim_padded(layer)
            record["keys"], record["values"] = kv_offsets[phase.layer]
        for w in range(n_workers):
            span = phase.spans[w]
            schedule[p, w] = (span.begin, span.end, span.step, phase.waits[w])
    items = [(item.phase, item.begin, item.end) for tape in program.tapes for item in tape]
    begins = np.cumsum([0] + [len(tape) for tape in program.tapes], dtype=np.int64)
    return FlatProgram(_model_record(program), phases, schedule, np.array(items, TAPE), begins)


def _kv_offsets(program: Program) -> list[tuple[int, int]]:
    """Per layer: byte offsets in the KV cache of its keys and its values."""
    offsets, end = [], 0
    target = program.target
    for layer in program.spec.layers:
        keys = target.streams * layer.n_kv_heads * ctx_padded(target.ctx) * layer.head_dim
        size = target.kv_format.element_bytes
        offsets.append((end * size, (end + keys) * size))
        end += layer_kv_elements(layer, target)
    return offsets


def _model_record(program: Program) -> NDArray[np.void]:
    spec, target, memory = program.spec, program.target, program.memory
    buffers: dict[Space, Buffer] = {b.space: b for b in memory.buffers}
    shared_end = max(b.offset + -(-b.n_bytes // 64) * 64 for b in memory.buffers)
    values = {
        "n_workers": target.n_workers,
        "n_phases": len(program.phases),
        "head_begin": program.head_begin,
        "rows": target.rows,
        "streams": target.streams,
        "ctx": target.ctx,
        "ctx_padded": ctx_padded(target.ctx),
        "chunks": n_chunks(target.ctx),
        "d_model": spec.d_model,
        "d_model_stride": padded(spec.d_model),
        "query_stride": buffers[Space.QUERY].shape[1],
        "hidden_stride": buffers[Space.HIDDEN].shape[1],
        "vocab_size": spec.vocab_size,
        "logits_stride": buffers[Space.LOGITS].shape[1],
        "n_heads_max": max(layer.n_heads for layer in spec.layers),
        "partial_stride": buffers[Space.PARTIAL].shape[1] - 2,
        "n_layers": spec.n_layers,
        "weight_format": target.weight_format.code,
        "kv_format": target.kv_format.code,
        "exact": int(target.exact),
        "embed_offset": program.embed_offset,
        "embed_phase": program.head_begin,
        "rope": shared_end,
        "scratch": shared_end + memory.rope_bytes,
        "scratch_bytes": memory.scratch_bytes,
        "input_stride": input_stride(spec),
        "work_bytes": memory.buffers_bytes,
    }
    for name in ("residual", "query", "partial", "hidden", "logits", "candidates", "tokens"):
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
    "kMaxHeadDim": MAX_HEAD_DIM,
}
