"""Every op of the table as one function over the units of one worker: the definition that other backends follow.

    embed                                        the residual is the embedding of each row's token
    qkv -> attend -> o_proj                      residual += attention(norm(residual))
    gate_up -> down                              residual += down(activation(gate) * up), of norm(residual)
    lm_head -> sample                            logits, and the best token

A product computes packed outputs; `row_map` says which row of the source tensors each one is. Activations are float32.
With bf16 weights they are rounded to bf16 at the input of a product, with quantized weights to int8 and a scale for
every group, unless the target is exact.
A branch with a norm to come is folded into the residual by its readers before it is added (program.ir.Fold).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...formats import BF16, round_to
from ...model.spec import Activation, QkNorm, RopeSpec
from ...program.ir import KEY_CHUNK, Op, Phase, Space, Vector
from ...program.ops import EMBED_BLOCK
from ...program.pack import row_map
from ...quantize import quantize_rows
from ..noise import gumbel
from ..nonfinite import in_logits, in_residual
from ..sampling import choose, chooses_from_logits
from .state import F32Array, State

Index = NDArray[np.int64]


def embed(state: State, phase: Phase, worker: int) -> None:
    """residual[:, columns] = embedding of the rows' tokens; a unit is EMBED_BLOCK columns."""
    n_rows = state.batch.n_rows
    table = state.weights.matrix(("embed",))  # (vocab_size, d_model)
    for unit in _units(phase, worker):
        columns = slice(unit * EMBED_BLOCK, (unit + 1) * EMBED_BLOCK)
        state.residual[:n_rows, columns] = table[state.rows.token[:n_rows], columns] * np.float32(phase.scale)


def qkv(state: State, phase: Phase, worker: int) -> None:
    """Projects norm(residual) and adds biases."""
    if _units(phase, worker):
        outputs, _, y = _product(state, phase, worker, _normed(state, phase, slice(state.batch.n_rows)))
        state.qkv[: len(y), outputs] = y


def attend(state: State, phase: Phase, worker: int) -> None:
    """One unit: the rows of a run and the query heads of one kv head, over one chunk of absolute key positions.

    The unit owns its piece of the KV cache: it first appends the keys and values of the rows whose positions lie in
    its chunk. Leaves exp(score - max) times the values, the max and the sum of the exps; rows that see no key of the
    chunk are left alone.
    """
    layer, batch, target = state.program.spec.layers[phase.layer], state.batch, state.program.target
    keys, values = state.keys[phase.layer], state.values[phase.layer]
    for unit in _units(phase, worker):
        group, kv_head = divmod(unit % (len(batch.runs) * layer.n_kv_heads), layer.n_kv_heads)
        first_key = unit // (len(batch.runs) * layer.n_kv_heads) * KEY_CHUNK
        run = batch.runs[group]
        rows = np.arange(run.begin, run.end)
        positions = run.pos + rows - run.begin
        if positions[-1] < first_key:
            continue
        new = (first_key <= positions) & (positions < first_key + KEY_CHUNK)
        heads = range(kv_head * layer.heads_per_kv, (kv_head + 1) * layer.heads_per_kv)
        k_head, v_head = layer.n_heads + kv_head, layer.n_heads + layer.n_kv_heads + kv_head
        keys[run.slot, kv_head, positions[new]] = round_to(_head(state, phase, rows, k_head)[new], target.kv_format)
        values[run.slot, kv_head, positions[new]] = round_to(_head(state, phase, rows, v_head)[new], target.kv_format)
        queries = np.stack([_head(state, phase, rows, head) for head in heads], axis=1)  # (rows, heads, head_dim)
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            begin = max(first_key, position + 1 - layer.window if layer.window else 0)
            end = min(first_key + KEY_CHUNK, position + 1)  # a row sees itself and what is before
            if end <= begin:
                continue
            scores = queries[row - run.begin] @ keys[run.slot, kv_head, begin:end].T * np.float32(layer.attention_scale)
            scores = _softcapped(scores, layer.score_softcap)
            largest = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - largest)
            result = state.partial[row, heads[0] : heads[-1] + 1, first_key // KEY_CHUNK]
            result[:, : layer.head_dim] = weights @ values[run.slot, kv_head, begin:end]
            result[:, -2], result[:, -1] = largest[:, 0], weights.sum(axis=1)


def o_proj(state: State, phase: Phase, worker: int) -> None:
    """residual += o(attention), the chunks of each row merged first, in position order."""
    if _units(phase, worker):
        _put_branch(state, phase, worker, _merged(state, phase))


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
        _put_branch(state, phase, worker, state.hidden[: state.batch.n_rows, :d_ff])


def lm_head(state: State, phase: Phase, worker: int) -> None:
    """Logits of the rows that want something, and the best token among this worker's outputs."""
    head_rows = np.array(state.batch.head_rows)
    state.candidate_scores[worker], state.candidate_ids[worker] = -np.inf, state.program.spec.vocab_size
    if not _units(phase, worker):
        return
    _, token_ids, y = _product(state, phase, worker, _normed(state, phase, head_rows))
    if not np.isfinite(y).all():
        raise in_logits(state.program)
    y = _softcapped(y, state.program.spec.logits_softcap)
    state.logits[: len(y), token_ids] = y
    for i, row in enumerate(head_rows):
        scores = _scores(state, int(row), token_ids, y[i])
        best = np.flatnonzero(scores == scores.max())
        state.candidate_scores[worker, i] = scores.max()
        state.candidate_ids[worker, i] = token_ids[best].min()


def sample(state: State, phase: Phase, worker: int) -> None:
    """A unit is a head row: the best token of all workers, lowest id first, or one chosen from its logits."""
    for i in _units(phase, worker):
        if i < len(state.batch.head_rows) and chooses_from_logits(state.rows, state.batch.head_rows[i]):
            state.tokens[i] = choose(state.rows, state.batch.head_rows[i], state.logits[i])
        elif i < len(state.batch.head_rows):
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


def gelu_tanh(x: F32Array) -> F32Array:
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3) (Hendrycks & Gimpel 2016)."""
    u = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    result: F32Array = np.float32(0.5) * x * (1 + np.tanh(u))
    return result


ACTIVATIONS: dict[Activation, Callable[[F32Array], F32Array]] = {
    Activation.SILU: silu,
    Activation.GELU_TANH: gelu_tanh,
}


def _units(phase: Phase, worker: int) -> range:
    span = phase.spans[worker]
    return range(span.begin, span.end, span.step)


def _normed(state: State, phase: Phase, rows: slice | Index) -> F32Array:
    """(rows, d_model) the residual with its fold, normed if the phase says so. NaN and Inf in it are found here."""
    x = state.residual[rows]
    if phase.fold is not None:
        x = x + _fold(state, phase, rows)
    if not np.isfinite(np.square(x).mean(axis=1)).all():
        raise in_residual(state.program, phase)
    return x if phase.norm is None else _rms_norm(state, x, phase.norm, phase.norm_eps)


def _rms_norm(state: State, x: F32Array, norm: Vector, eps: float) -> F32Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""
    mean = np.mean(x * x, axis=-1, keepdims=True)
    normed: F32Array = x / np.sqrt(mean + np.float32(eps)) * state.weights.vector(norm.roles)
    return normed


def _fold(state: State, phase: Phase, rows: slice | Index) -> F32Array:
    """(rows, d_model) what the residual lacks."""
    assert phase.fold is not None
    branch = state.branches[phase.fold.space][rows]
    if not np.isfinite(np.square(branch).mean(axis=1)).all():
        raise in_residual(state.program, phase)
    return _rms_norm(state, branch, phase.fold.norm, phase.fold.norm_eps) * np.float32(phase.fold.scale)


def _product(state: State, phase: Phase, worker: int, x: F32Array) -> tuple[Index, Index, F32Array]:
    """(n) packed outputs of the worker's tiles without padding, (n) their source rows, (rows, n) results with bias."""
    matrix, span = phase.matrix, phase.spans[worker]
    assert matrix is not None
    target = state.program.target
    if matrix.format is BF16 and not target.exact:
        x = round_to(x, BF16)
    if matrix.format.scale_group and not target.exact:
        values, scales = quantize_rows(x, matrix.format.scale_group)
        x = (values * np.repeat(scales, matrix.format.scale_group, axis=1)).astype(np.float32)[:, : matrix.k]
    outputs = np.arange(span.begin * matrix.tile_outputs, span.end * matrix.tile_outputs)
    sources = row_map(matrix)[outputs].astype(np.int64)
    outputs, sources = outputs[sources >= 0], sources[sources >= 0]
    y = x @ state.weights.matrix(matrix.roles)[sources].T
    if phase.bias is not None:
        y = y + state.weights.vector(phase.bias.roles)[sources]
    return outputs, sources, y * np.float32(phase.scale)


def _put_branch(state: State, phase: Phase, worker: int, x: F32Array) -> None:
    """The product into the residual, or into a branch; what the residual lacked before is added to it."""
    _, columns, y = _product(state, phase, worker, x)
    n_rows = len(y)
    if phase.fold is not None:
        state.residual[:n_rows, columns] += _fold(state, phase, slice(n_rows))[:, columns]
    if phase.to is Space.RESIDUAL:
        state.residual[:n_rows, columns] += y
    else:
        state.branches[phase.to][:n_rows, columns] = y


def _head(state: State, phase: Phase, rows: Index, head: int) -> F32Array:
    """(rows, head_dim) one head of the projection as attention takes it; queries first, then keys, then values."""
    layer = state.program.spec.layers[phase.layer]
    n, width = layer.head_dim, slice(head * layer.head_dim, (head + 1) * layer.head_dim)
    y: F32Array = state.qkv[rows, width]
    if head >= layer.n_heads + layer.n_kv_heads:
        return y
    is_key = head >= layer.n_heads
    norm = phase.k_norm if is_key else phase.q_norm
    if norm is not None and layer.qk_norm is QkNorm.HEAD:
        y = _rms_norm(state, y, norm, phase.norm_eps)
    elif norm is not None:
        begin, end = (layer.q_width, layer.q_width + layer.kv_width) if is_key else (0, layer.q_width)
        first = head * n - begin
        y = _rms_norm(state, state.qkv[rows, begin:end], norm, phase.norm_eps)[:, first : first + n]
    return y if layer.rope is None else _rotate(state, y, layer.rope, rows)


def _rotate(state: State, y: F32Array, rope: RopeSpec, rows: Index) -> F32Array:
    """Pairs (i, i + rotary_dim / 2) of each row turned by the angles of its position; the rest as it is."""
    cos, sin = state.ropes[rope][state.rows.pos[rows]].transpose(1, 0, 2)  # (rows, rotary_dim / 2) each
    a, b, rest = np.split(y, (rope.rotary_dim // 2, rope.rotary_dim), axis=1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin, rest), axis=1)


def _softcapped(x: F32Array, softcap: float | None) -> F32Array:
    """softcap * tanh(x / softcap); NaN for what is not finite, which tanh would hide."""
    if softcap is None:
        return x
    return np.where(np.isfinite(x), np.tanh(x / np.float32(softcap)) * np.float32(softcap), np.float32(np.nan))


def _merged(state: State, phase: Phase) -> F32Array:
    """(rows, q_width) attention results: each row's chunks, rescaled to their common max, added in position order."""
    layer, n_rows = state.program.spec.layers[phase.layer], state.batch.n_rows
    merged = np.zeros((n_rows, layer.n_heads, layer.head_dim), np.float32)
    for row in range(n_rows):
        last = int(state.rows.pos[row])
        first = max(last + 1 - layer.window, 0) if layer.window else 0  # keys seen
        partial = state.partial[row, : layer.n_heads, first // KEY_CHUNK : last // KEY_CHUNK + 1]
        scale = np.exp(partial[..., -2] - partial[..., -2].max(axis=1, keepdims=True))  # (n_heads, chunks seen)
        total = np.zeros((layer.n_heads, 1), np.float32)
        for chunk in range(partial.shape[1]):
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
