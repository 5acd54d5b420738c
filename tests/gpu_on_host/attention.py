"""Attention of one layer on the simulated GPU, and the same in NumPy float64, for random queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_on_host.one_phase import Group, OnePhase
from numpy.typing import NDArray

from flashformer.formats import BF16, FORMATS, Format, from_f32, round_to, to_f32
from flashformer.model.rope import rope_table
from flashformer.model.spec import Activation, LayerSpec, ModelSpec, QkNorm, RopeKind, RopeSpec
from flashformer.program import Target, build
from flashformer.program.ir import KEY_CHUNK, Layout, Op, Space

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A layer and its sequences. `rotary`: elements of a head that rotate, 0 for none."""

    head_dim: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    kv: str = "bf16"
    rotary: int | None = None  # all of them
    window: int | None = None
    qk_norm: QkNorm | None = None
    softcap: float | None = None
    streams: int = 3
    ctx: int = 1024
    n_workers: int = 3
    n_rows: int = 8

    @property
    def layer(self) -> LayerSpec:
        rotary = self.head_dim if self.rotary is None else self.rotary
        rope = RopeSpec(RopeKind.DEFAULT, 10000.0, rotary) if rotary else None
        return LayerSpec(
            self.n_heads, self.n_kv_heads, self.head_dim, 64, False, False, False, 1e-5, Activation.SILU,
            1.3 * self.head_dim**-0.5, rope, qk_norm=self.qk_norm, window=self.window, score_softcap=self.softcap,
        )  # fmt: skip

    @property
    def model(self) -> ModelSpec:
        return ModelSpec(64, 101, 4096, (self.layer,), 1e-5, False, 1, (2,))

    @property
    def format(self) -> Format:
        return FORMATS[self.kv]


class Attention:
    """Random projections for every position of every slot; positions before `known` are in the cache already.

    All the rest of the cache is NaN until the kernel appends to it.
    """

    def __init__(self, case: Case, known: Sequence[int] = (), seed: int = 1, **options: int):
        self.case, layer = case, case.layer
        target = Target(case.n_workers, BF16, case.format, 16, case.streams, case.ctx, layout=Layout.FRAGMENTS)
        self.kernel = OnePhase(build(case.model, target), Op.ATTEND, n_rows=case.n_rows, seed=seed, **options)
        random = np.random.default_rng(seed)
        heads = case.n_heads + 2 * case.n_kv_heads
        self.projected = random.normal(size=(case.streams, case.ctx, heads, case.head_dim)).astype(np.float32)
        self.projected[:, :, : case.n_heads] *= 2  # scores that differ
        self.norms = [np.ones(0, np.float32)] * 2
        if layer.qk_norm is not None:
            self._make_norms(random, layer)
        self.heads = self._heads()  # (streams, ctx, heads, head_dim) float64, rounded to the KV format
        self._fill_cache(list(known) + [0] * (case.streams - len(known)))

    def _make_norms(self, random: np.random.Generator, layer: LayerSpec) -> None:
        record = self.kernel.phase
        by_head = layer.qk_norm is QkNorm.HEAD
        lengths = (layer.head_dim,) * 2 if by_head else (layer.q_width, layer.kv_width)
        for i, (name, length) in enumerate(zip(("q_norm", "k_norm"), lengths, strict=True)):
            self.norms[i] = random.uniform(0.5, 1.5, length).astype(np.float32)
            at = int(record[name])
            self.kernel.weights[at : at + 4 * length] = self.norms[i].view(np.uint8)

    def _heads(self) -> F64:
        case, layer = self.case, self.case.layer
        x = self.projected.astype(np.float64)
        parts = [(0, case.n_heads), (case.n_heads, case.n_heads + case.n_kv_heads)]
        if layer.qk_norm is not None:
            for weight, (begin, end) in zip(self.norms, parts, strict=True):
                heads = x[:, :, begin:end]
                axes = (-1,) if layer.qk_norm is QkNorm.HEAD else (-2, -1)
                mean = np.square(heads).mean(axis=axes, keepdims=True)
                shape = (-1, case.head_dim) if layer.qk_norm is QkNorm.WIDTH else (case.head_dim,)
                x[:, :, begin:end] = heads / np.sqrt(mean + layer.norm_eps) * weight.reshape(shape)
        if layer.rope is not None:
            half = layer.rope.rotary_dim // 2
            table = rope_table(layer.rope, case.ctx).astype(np.float64)  # (ctx, 2, half)
            cos, sin = table[:, 0, None], table[:, 1, None]
            rotated = x[:, :, : parts[1][1]]
            a, b = rotated[..., :half].copy(), rotated[..., half : 2 * half].copy()
            rotated[..., :half], rotated[..., half : 2 * half] = a * cos - b * sin, b * cos + a * sin
        return round_to(x.astype(np.float32), case.format).astype(np.float64)

    # ---- the cache: (streams, n_kv_heads, chunks) of 256 * padded elements, keys then values

    @property
    def padded(self) -> int:
        return -(-self.case.head_dim // 32) * 32

    def _cache(self) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        record, case = self.kernel.phase, self.case
        chunks = int(self.kernel.flat.model["ctx_padded"][0]) // KEY_CHUNK
        shape = (case.streams, case.n_kv_heads, chunks, KEY_CHUNK * self.padded)
        n_bytes = int(np.prod(shape)) * 2
        keys, values = (self.kernel.kv[int(record[k]) :][:n_bytes].view(np.uint16) for k in ("keys", "values"))
        return keys.reshape(shape), values.reshape(shape)

    def _fill_cache(self, known: list[int]) -> None:
        case = self.case
        nan = from_f32(np.full(1, np.nan, np.float32), case.format).view(np.uint16)[0]
        keys, values = self._cache()
        keys[:], values[:] = nan, nan
        key, d = np.meshgrid(np.arange(KEY_CHUNK), np.arange(self.padded), indexing="ij")
        for slot, n in enumerate(known):
            both = np.zeros((2, case.n_kv_heads, case.ctx, self.padded), np.float32)
            for i in range(2):
                begin = case.n_heads + i * case.n_kv_heads
                both[i, ..., : case.head_dim] = self.heads[slot, :, begin : begin + case.n_kv_heads].swapaxes(0, 1)
            for pos in range(0, n, KEY_CHUNK):
                some = np.arange(KEY_CHUNK) < n - pos
                bits = from_f32(both[:, :, pos : pos + KEY_CHUNK], case.format).view(np.uint16)
                bits = np.where(some[:, None], bits, nan)
                keys[slot, :, pos // KEY_CHUNK, _place(key, d, self.padded // 32)] = bits[0].transpose(1, 2, 0)
                values[slot, :, pos // KEY_CHUNK, _place(d, key, KEY_CHUNK // 32)] = bits[1].transpose(1, 2, 0)

    def cached(self, slot: int, pos: int) -> tuple[F32, F32]:
        """(n_kv_heads, padded) the key and the value that the cache has for a position."""
        keys, values = self._cache()
        d = np.arange(self.padded)
        at, chunk = np.full_like(d, pos % KEY_CHUNK), pos // KEY_CHUNK
        pair = keys[slot, :, chunk, _place(at, d, self.padded // 32)], values[slot, :, chunk, _place(d, at, 8)]
        key, value = (to_f32(x.T.copy().view(self.case.format.storage), self.case.format) for x in pair)
        return key, value

    # ---- running and the truth

    def run(self, groups: list[Group]) -> str:
        """One forward. The finding, or an empty text."""
        qkv = self.kernel.buffer(Space.QKV)
        qkv[:] = np.nan
        row = 0
        for group in groups:
            some = self.projected[group.slot, group.pos : group.pos + group.n].reshape(group.n, -1)
            qkv[row : row + group.n, : some.shape[1]] = some
            row += group.n
        return self.kernel.run(groups)

    def result(self, groups: list[Group]) -> list[F32]:
        """Of every group (n, n_heads, head_dim), where o_proj reads it."""
        model = self.kernel.flat.model[0]
        flat = self.kernel.buffer(Space.PARTIAL).reshape(-1)
        shape = (int(model["rows"]), int(model["n_heads_max"]), int(model["chunks"]), int(model["partial_stride"]))
        values = flat[: int(np.prod(shape))].reshape(shape)
        found, row = [], 0
        for group in groups:
            firsts = [self.first(group.pos + i) // KEY_CHUNK for i in range(group.n)]
            rows = [values[row + i, : self.case.n_heads, first] for i, first in enumerate(firsts)]
            found.append(np.stack(rows)[..., : self.case.head_dim].copy())
            row += group.n
        return found

    def first(self, pos: int) -> int:
        """The first position that a row sees."""
        return max(pos + 1 - self.case.window, 0) if self.case.window else 0

    def expected(self, slot: int, pos: int) -> F64:
        """(n_heads, head_dim)"""
        case, layer = self.case, self.case.layer
        seen = slice(self.first(pos), pos + 1)
        keys = self.heads[slot, seen, case.n_heads : case.n_heads + case.n_kv_heads]
        values = self.heads[slot, seen, case.n_heads + case.n_kv_heads :]
        queries = self.heads[slot, pos, : case.n_heads].reshape(case.n_kv_heads, -1, case.head_dim)
        scores = np.einsum("hqd,khd->hqk", queries, keys) * layer.attention_scale
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        result: F64 = np.einsum("hqk,khd->hqd", weights, values).reshape(case.n_heads, case.head_dim)
        return result

    def check(self, groups: list[Group], found: list[F32]) -> None:
        """Every row is the truth, but for weights of 8 or 11 bits and queries and keys that round the other way."""
        tolerance = 2.0 ** (-7 if self.case.kv == "bf16" else -9)
        for group, rows in zip(groups, found, strict=True):
            for i in range(group.n):
                expected = self.expected(group.slot, group.pos + i)
                error = np.abs(rows[i] - expected).max()
                assert error <= tolerance * np.abs(expected).max(), (group, i, error)


def _place(row: NDArray[Any], k: NDArray[Any], n_steps: int) -> NDArray[Any]:
    """Where element (row, k) of an operand lies: tiles of 16 rows, steps of 32 k, 16 bytes per lane and instruction."""
    lane = row % 8 * 4 + k % 32 // 8
    word = k // 2 % 2 * 2 + row % 16 // 8
    place: NDArray[Any] = (row // 16 * n_steps + k // 32) * 512 + k // 4 % 2 * 256 + lane * 8 + word * 2 + k % 2
    return place
