"""What a forward of the reference works on: weights by role, buffers full of NaN, the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...formats import Format, round_to, to_f32
from ...model.rope import rope_table
from ...program.ir import MAX_HEAD_ROWS, Program
from ...program.memory import branches
from ...program.ops import n_chunks, qkv_width
from ...quantize import round_weights
from ..base import Rows
from ..rows import Batch

F32Array = NDArray[np.float32]


class StoredTensor(Protocol):
    """A tensor of a checkpoint: raw bits of `format` in the logical shape."""

    @property
    def format(self) -> Format: ...

    @property
    def data(self) -> NDArray[np.generic]: ...


class Weights:
    """Tensors by role, as float32. Matrices have the values that the Program's weight format gives them."""

    def __init__(self, program: Program, tensors: Mapping[str, StoredTensor]) -> None:
        self._matrices: dict[tuple[str, ...], F32Array] = {}
        self._vectors: dict[tuple[str, ...], F32Array] = {}
        fmt = program.target.weight_format

        def stacked(roles: tuple[str, ...]) -> F32Array:
            return np.concatenate([to_f32(np.asarray(tensors[role].data), tensors[role].format) for role in roles])

        for phase in program.phases:
            if phase.matrix is not None:
                self._matrices[phase.matrix.roles] = as_packed(stacked(phase.matrix.roles), phase.matrix.format)
            for vector in phase.vectors.values():
                self._vectors[vector.roles] = stacked(vector.roles)
        if ("embed",) not in self._matrices:
            self._matrices["embed",] = round_to(stacked(("embed",)), fmt)

    def matrix(self, roles: tuple[str, ...]) -> F32Array:
        """(n_out, k) source tensors stacked."""
        return self._matrices[roles]

    def vector(self, roles: tuple[str, ...]) -> F32Array:
        """(n) source tensors in a row."""
        return self._vectors[roles]


def as_packed(values: F32Array, fmt: Format) -> F32Array:
    return round_weights(values, fmt) if fmt.scale_group else round_to(values, fmt)


def poison(*shape: int) -> F32Array:
    return np.full(shape, np.nan, np.float32)


class State:
    """Buffers named as in program.ir.Space, coordinates as in program.ops."""

    def __init__(self, program: Program, weights: Weights, rows: Rows) -> None:
        target, layers = program.target, program.spec.layers
        self.program, self.weights, self.rows = program, weights, rows
        self.batch = Batch(0, (), ())
        heads, head_dim = max(layer.n_heads for layer in layers), max(layer.head_dim for layer in layers)
        self.residual = poison(target.rows, program.spec.d_model)
        self.branches = {space: poison(target.rows, program.spec.d_model) for space in branches(program.spec)}
        self.qkv = poison(target.rows, max(qkv_width(layer) for layer in layers))
        self.partial = poison(target.rows, heads, n_chunks(target.ctx), head_dim + 2)  # weighted values, max, sum
        self.hidden = poison(target.rows, max(layer.d_ff for layer in layers))
        self.logits = poison(MAX_HEAD_ROWS, program.spec.vocab_size)
        self.candidate_scores = poison(target.n_workers, MAX_HEAD_ROWS)
        self.candidate_ids = np.full((target.n_workers, MAX_HEAD_ROWS), -1, np.int32)
        self.tokens = np.full(MAX_HEAD_ROWS, -1, np.int32)
        # per layer (streams, n_kv_heads, ctx, head_dim), as the KV format holds them
        shapes = [(target.streams, layer.n_kv_heads, target.ctx, layer.head_dim) for layer in layers]
        self.keys = [poison(*shape) for shape in shapes]
        self.values = [poison(*shape) for shape in shapes]
        self.ropes = {rope: rope_table(rope, target.ctx) for rope in program.spec.ropes}  # (ctx, 2, rotary_dim / 2)

    def begin(self, batch: Batch) -> None:
        """Poisons everything that this forward has to produce, and the KV cache from each run's first position."""
        self.batch = batch
        floats = (self.residual, self.qkv, self.partial, self.hidden, self.logits, self.candidate_scores)
        for buffer in (*floats, *self.branches.values()):
            buffer[:] = np.nan
        self.candidate_ids[:] = -1
        self.tokens[:] = -1
        for run in batch.runs:
            for cache in (*self.keys, *self.values):
                cache[run.slot, :, run.pos :] = np.nan
