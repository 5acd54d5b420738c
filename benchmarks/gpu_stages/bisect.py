"""The first phase after which a buffer is not what NumPy has there: the kernel runs longer and longer prefixes of its
Program, NumPy the same phases one by one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.reference.kernel import ReferenceKernel
from flashformer.backends.reference.ops import OPS, _merged
from flashformer.backends.reference.state import State
from flashformer.backends.rows import read_rows
from flashformer.errors import NumericalError
from flashformer.program.ir import KEY_CHUNK, Op, Phase, Space
from flashformer.program.ops import n_chunks, result_spaces

from .compare import F32Array
from .decode import ask, prompt_logits, run_phases

MOST_ERROR = 3e-2  # of the largest expected number of the buffer: rounding is far less
WRITES = {Op.EMBED: Space.RESIDUAL, Op.QKV: Space.QKV, Op.ATTEND: Space.PARTIAL, Op.GATE_UP: Space.HIDDEN,
          Op.LM_HEAD: Space.LOGITS}  # fmt: skip


def first_wrong_phase(
    kernel: CudaKernel, reference: ReferenceKernel, ids: NDArray[np.int32], begin: int, end: int, slot: int
) -> dict[str, Any]:
    """Of the forward of positions [begin, end) of `ids`, whose earlier positions are in the kernel's slot. Empty if
    there is none; else `phase`, `op`, `layer`, `buffer` and, of the number that is furthest off, `row`, `column`,
    `found`, `expected`; with all `errors` up to there.
    """
    if begin:
        prompt_logits(reference, ids[:begin], reference.program.target.rows, wanted=np.empty(0, np.int64))
    ask(reference, 0, ids[begin:end], begin, 0)
    state, errors = reference._state, []
    assert state is not None
    state.begin(read_rows(reference.rows, end - begin, reference.program))
    ask(kernel, 0, ids[begin:end], begin, slot)
    pairs = list(zip(kernel.program.phases, reference.program.phases, strict=True))
    for n, (phase, same) in enumerate(pairs, 1):
        assert (phase.op, phase.layer) == (same.op, same.layer)
        with suppress(NumericalError):  # the buffers will show it
            run_phases(kernel, end - begin, n)
        for worker in range(reference.program.target.n_workers):
            OPS[same.op](state, same, worker)
        for space in spaces_of(phase):
            found, expected = gpu_buffer(kernel, phase, space, end - begin), host_buffer(state, same, space)
            error, place = furthest(found, expected)
            errors.append([n - 1, phase.op.value, phase.layer, space.value, error])
            if error > MOST_ERROR:
                return {
                    "phase": n - 1, "op": phase.op.value, "layer": phase.layer, "buffer": space.value,
                    "row": place[0], "column": place[1], "found": float(found[place]),
                    "expected": float(expected[place]), "errors": errors,
                }  # fmt: skip
    return {}


def spaces_of(phase: Phase) -> tuple[Space, ...]:
    """What a phase leaves that both sides have in the same form."""
    if phase.op in (Op.O_PROJ, Op.DOWN):
        return result_spaces(phase)
    return (WRITES[phase.op],) if phase.op in WRITES else ()


def furthest(found: F32Array, expected: F32Array) -> tuple[float, tuple[int, int]]:
    """(error relative to the largest expected number, where); infinite for what is not finite."""
    difference = np.abs(found.astype(np.float64) - expected)
    difference[~np.isfinite(difference)] = np.inf
    row, column = np.unravel_index(difference.argmax(), difference.shape)
    return float(difference.max() / max(np.abs(expected).max(), 1e-30)), (int(row), int(column))


def host_buffer(state: State, phase: Phase, space: Space) -> F32Array:
    """(rows, columns); of attention, what o_proj reads of it."""
    n, layer = state.batch.n_rows, state.program.spec.layers[phase.layer]
    if space is Space.PARTIAL:
        return _merged(state, phase)
    if space is Space.QKV:
        return state.qkv[:n, : layer.q_width + 2 * layer.kv_width]
    if space is Space.HIDDEN:
        return state.hidden[:n, : layer.d_ff]
    if space is Space.LOGITS:
        return state.logits[: len(state.batch.head_rows)]
    return (state.residual if space is Space.RESIDUAL else state.branches[space])[:n]


def gpu_buffer(kernel: CudaKernel, phase: Phase, space: Space, n_rows: int) -> F32Array:
    """As `host_buffer`. Rows are padded in memory, and attention has its merged result in the first chunk it sees."""
    program = kernel.program
    buffer = next(b for b in program.memory.buffers if b.space is space)
    whole = kernel._gpu.pinned(buffer.n_bytes)
    try:
        kernel._gpu.read(whole, int(kernel._launch["work"][0]) + buffer.offset)
        kernel._gpu.finish()
        numbers = whole.view(np.float32).copy()
    finally:
        kernel._gpu.unpin(whole)
    layer = program.spec.layers[phase.layer]
    if space is not Space.PARTIAL:
        widths = {Space.QKV: layer.q_width + 2 * layer.kv_width, Space.HIDDEN: layer.d_ff,
                  Space.LOGITS: program.spec.vocab_size}  # fmt: skip
        return numbers.reshape(buffer.shape)[:n_rows, : widths.get(space, program.spec.d_model)]
    heads, chunks = max(la.n_heads for la in program.spec.layers), n_chunks(program.target.ctx)
    stride = buffer.shape[1] - 2
    n_values = program.target.rows * heads * chunks * stride  # maxima and sums lie behind the values
    values = numbers[:n_values].reshape(-1, heads, chunks, stride)
    last = kernel.rows.pos[:n_rows]
    first = np.maximum(last + 1 - layer.window, 0) // KEY_CHUNK if layer.window else np.zeros_like(last)
    seen: F32Array = values[np.arange(n_rows), : layer.n_heads, first, : layer.head_dim]
    return seen.reshape(n_rows, -1)
