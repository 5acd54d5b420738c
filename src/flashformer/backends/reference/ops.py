"""Every op of the table as one function over the units of one worker: the definition that other backends follow.

    embed                                        the residual is the embedding of each row's token
    qkv -> attend -> o_proj                      residual += attention(norm(residual))
    gate_up -> down                              residual += down(silu(gate) * up), of norm(residual)
    lm_head -> sample                            logits, and the best token

A product computes packed outputs; `row_map` says which row of the source tensors each one is. Activations are float32.
With bf16 weights they are rounded to bf16 at the input of a product, unless the target is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...formats import round_to
from ...model.spec import Activation
from ...program.ir import KEY_CHUNK, Op, Phase
from ...program.ops import EMBED_BLOCK
from ...program.pack import row_map
from ..noise import gumbel
from ..nonfinite import in_logits, in_residual
from .state import F32Array, State

Index = NDArray[np.int64]


def embed(state: State, phase: Phase, worker: int) -> None:
    """residual[:, columns] = embedding of the rows' tokens; a unit is EMBED_BLOCK columns."""
    n_rows = state.batch.n_rows
    table = state.weights.matrix(("embed",))  # (vocab_size, d_model)
    for unit in _units(phase, worker):
        columns = slice(unit * EMBED_BLOCK, (unit + 1) * EMBED_BLOCK)
        state.residual[:n_rows, columns] = table[state.rows.token[:n_rows], columns]


def qkv(state: State, phase: Phase, worker: int) -> None:
    """Projects norm(residual), adds biases, rotates queries and keys, stores keys and values in the KV cache."""
    layer = state.program.spec.layers[phase.layer]
    if not _units(phase, worker):
        return
    outputs, _, y = _product(state, phase, worker, _normed(state, phase, slice(state.batch.n_rows)))
    rotated = outputs < layer.q_width + layer.kv_width
    y[:, rotated] = _rotate(state, y[:, rotated], outputs[rotated], layer.head_dim)

    is_query = outputs < layer.q_width
    state.query[: state.batch.n_rows, outputs[is_query]] = y[:, is_query]
    stored = round_to(y, state.program.target.kv_format)
    slots, positions = state.rows.slot[: len(y)], state.rows.pos[: len(y)]
    for cache, begin in ((state.keys, layer.q_width), (state.values, layer.q_width + layer.kv_width)):
        columns = np.flatnonzero((begin <= outputs) & (outputs < begin + layer.kv_width))
        head, dim = np.divmod(outputs[columns] - begin, layer.head_dim)
        cache[phase.layer][slots[:, None], head, positions[:, None], dim] = stored[:, columns]


def attend(state: State, phase: Phase, worker: int) -> None:
    """One unit: the rows of a run and the query heads of one kv head, over one chunk of absolute key positions.

    Leaves exp(score - max) times the values, the max and the sum of the exps; rows that see no key of the chunk are
    left alone.
    """
    layer, batch, target = state.program.spec.layers[phase.layer], state.batch, state.program.target
    keys, values = state.keys[phase.layer], state.values[phase.layer]
    for unit in _units(phase, worker):
        group, kv_head = divmod(unit % (target.streams * layer.n_kv_heads), layer.n_kv_heads)
        first_key = unit // (target.streams * layer.n_kv_heads) * KEY_CHUNK
        if group >= len(batch.runs):
            continue
        run = batch.runs[group]
        heads = np.arange(kv_head * layer.heads_per_kv, (kv_head + 1) * layer.heads_per_kv)
        for row in range(run.begin, run.end):
            end = min(first_key + KEY_CHUNK, run.pos + row - run.begin + 1)  # a row sees itself and what is before
            if end <= first_key:
                continue
            queries = state.query[row, : layer.q_width].reshape(layer.n_heads, layer.head_dim)[heads]
            scores = queries @ keys[run.slot, kv_head, first_key:end].T * np.float32(layer.attention_scale)
            largest = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - largest)
            result = state.partial[row, heads[0] : heads[-1] + 1, first_key // KEY_CHUNK]
            result[:, : layer.head_dim] = weights @ values[run.slot, kv_head, first_key:end]
            result[:, -2], result[:, -1] = largest[:, 0], weights.sum(axis=1)


def o_proj(state: State, phase: Phase, worker: int) -> None:
    """residual += o(attention), the chunks of each row merged first, in position order."""
    if _units(phase, worker):
        _add_product(state, phase, worker, _merged(state, phase))


def gate_up(state: State, phase: Phase, worker: int) -> None:
    """hidden = activation(gate) * up, of norm(residual). A tile holds the gate and up rows of the same columns."""
    layer = state.program.spec.layers[phase.layer]
    if not _units(phase, worker):
        return
    _, sources, y = _product(state, phase, worker, _normed(state, phase, slice(state.batch.n_rows)))
    is_gate = sources < layer.d_ff
    columns = sources[is_gate]
    assert np.array_equal(sources[~is_gate] - layer.d_ff, columns), "gate and up of a column lie in different tiles"
    state.hidden[: len(y), columns] = ACTIVATIONS[layer.activation](y[:, is_gate]) * y[:, ~is_gate]


def down(state: State, phase: Phase, worker: int) -> None:
    """residual += down(hidden)."""
    if _units(phase, worker):
        d_ff = state.program.spec.layers[phase.layer].d_ff
        _add_product(state, phase, worker, state.hidden[: state.batch.n_rows, :d_ff])


def lm_head(state: State, phase: Phase, worker: int) -> None:
    """Logits of the rows that want something, and the best token among this worker's outputs."""
    head_rows = np.array(state.batch.head_rows)
    state.candidate_scores[worker], state.candidate_ids[worker] = -np.inf, state.program.spec.vocab_size
    if not _units(phase, worker):
        return
    _, token_ids, y = _product(state, phase, worker, _normed(state, phase, head_rows))
    if not np.isfinite(y).all():
        raise in_logits(state.program)
    state.logits[: len(y), token_ids] = y
    for i, row in enumerate(head_rows):
        scores = _scores(state, int(row), token_ids, y[i])
        best = np.flatnonzero(scores == scores.max())
        state.candidate_scores[worker, i] = scores.max()
        state.candidate_ids[worker, i] = token_ids[best].min()


def sample(state: State, phase: Phase, worker: int) -> None:
    """The best token of all workers; the lowest id among equals. A unit is a head row."""
    for i in _units(phase, worker):
        if i < len(state.batch.head_rows):
            scores = state.candidate_scores[:, i]
            assert not np.isnan(scores).any(), "a worker left no candidate"
            state.tokens[i] = state.candidate_ids[scores == scores.max(), i].min()


OPS: dict[Op, Callable[[State, Phase, int], None]] = {
    Op.EMBED: embed,
    Op.QKV: qkv,
    Op.ATTEND: attend,
    Op.O_PROJ: o_proj,
    Op.GATE_UP: gate_up,
    Op.DOWN: down,
    Op.LM_HEAD: lm_head,
    Op.SAMPLE: sample,
}


def silu(x: F32Array) -> F32Array:
    result: F32Array = x / (1 + np.exp(-x))  # exp(-x) = inf gives the right limit, 0
    return result


ACTIVATIONS: dict[Activation, Callable[[F32Array], F32Array]] = {Activation.SILU: silu}


def _units(phase: Phase, worker: int) -> range:
    span = phase.spans[worker]
    return range(span.begin, span.end, span.step)


def _normed(state: State, phase: Phase, rows: slice | Index) -> F32Array:
    """(rows, d_model) x / sqrt(mean(x^2) + eps) * weight. NaN and Inf in the residual are found here."""
    assert phase.norm is not None
    x = state.residual[rows]
    mean = np.mean(x * x, axis=1, keepdims=True)
    if not np.isfinite(mean).all():
        raise in_residual(state.program, phase)
    normed: F32Array = x / np.sqrt(mean + np.float32(phase.norm_eps)) * state.weights.vector(phase.norm.roles)
    return normed


def _product(state: State, phase: Phase, worker: int, x: F32Array) -> tuple[Index, Index, F32Array]:
    """(n) packed outputs of the worker's tiles without padding, (n) their source rows, (rows, n) results with bias."""
    matrix, span = phase.matrix, phase.spans[worker]
    assert matrix is not None
    target = state.program.target
    if not target.exact:
        x = round_to(x, target.weight_format)
    outputs = np.arange(span.begin * matrix.tile_outputs, span.end * matrix.tile_outputs)
    sources = row_map(matrix)[outputs].astype(np.int64)
    outputs, sources = outputs[sources >= 0], sources[sources >= 0]
    y = x @ state.weights.matrix(matrix.roles)[sources].T
    if phase.bias is not None:
        y = y + state.weights.vector(phase.bias.roles)[sources]
    return outputs, sources, y


def _add_product(state: State, phase: Phase, worker: int, x: F32Array) -> None:
    _, columns, y = _product(state, phase, worker, x)
    state.residual[: len(y), columns] += y


def _rotate(state: State, y: F32Array, outputs: Index, head_dim: int) -> F32Array:
    """Rotates pairs of neighbouring packed outputs by the angles of each row's position."""
    pair = outputs[::2] % head_dim // 2
    table = state.rope[head_dim][state.rows.pos[: len(y), None], pair]  # (rows, pairs, 2)
    cos, sin = table[..., 0], table[..., 1]
    a, b = y[:, ::2], y[:, 1::2]
    return np.stack((a * cos - b * sin, b * cos + a * sin), axis=-1).reshape(y.shape)


def _merged(state: State, phase: Phase) -> F32Array:
    """(rows, q_width) attention results: each row's chunks, rescaled to their common max, added in position order."""
    layer, n_rows = state.program.spec.layers[phase.layer], state.batch.n_rows
    merged = np.zeros((n_rows, layer.n_heads, layer.head_dim), np.float32)
    for row in range(n_rows):
        n_seen = state.rows.pos[row] // KEY_CHUNK + 1
        partial = state.partial[row, : layer.n_heads, :n_seen]  # (n_heads, n_seen, head_dim + 2)
        scale = np.exp(partial[..., -2] - partial[..., -2].max(axis=1, keepdims=True))  # (n_heads, n_seen)
        total = np.zeros((layer.n_heads, 1), np.float32)
        for chunk in range(n_seen):
            merged[row] += partial[:, chunk, : layer.head_dim] * scale[:, chunk, None]
            total += partial[:, chunk, -1:] * scale[:, chunk, None]
        merged[row] /= total
    return merged.reshape(n_rows, layer.q_width)


def _scores(state: State, row: int, token_ids: Index, logits: F32Array) -> F32Array:
    """What the best token maximises: the logit, or a sample of softmax(logits / temperature) by its noise."""
    temperature = state.rows.temperature[row]
    if temperature == 0:
        return logits
    seed, choice, pos = int(state.rows.seed[row]), int(state.rows.choice[row]), int(state.rows.pos[row])
    noisy: F32Array = logits / temperature + gumbel(seed, choice, pos, token_ids)
    return noisy
