"""Products on the simulated GPU: matrices packed by the description in program/fragments.py, a few phases by hand, and
the buffers they work on.

Nothing here uses the packing, lowering or scheduling of the package, only its record layouts: what the kernel makes of
a matrix is compared with plain NumPy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gpu_on_host.build import build
from gpu_on_host.simulator import Simulator, aligned
from numpy.typing import NDArray

from flashformer.backends.cuda import specialize
from flashformer.backends.cuda.launch import LAUNCH
from flashformer.formats import BF16, FORMATS, QUANTS, Format, from_f32, round_to
from flashformer.program import fragments
from flashformer.program.ir import Op
from flashformer.program.ops import OPS
from flashformer.program.records import MODEL, PHASE, SPAN, TAPE

F32Array = NDArray[np.float32]
ALL_FORMATS: dict[str, Format] = {**FORMATS, **QUANTS}
BASE = 2**32 - 2  # of the arrivals: a block's first one still counts up, what it waits for next has wrapped around
SHARED_LIMIT = 227 << 10
AREA_BYTES = 8 * (specialize.SCORE_STRIDE + 64)  # attention over heads of 32
NOTHING = -1


def padded(n: int, to: int = 64) -> int:
    return -(-n // to) * to


# ---- matrices


@dataclass(frozen=True)
class Matrix:
    """`values` (n_out, k) as the kernel multiplies them, and the packed bytes."""

    fmt: Format
    values: NDArray[np.float64]
    packed: NDArray[np.uint8]

    @property
    def n_tiles(self) -> int:
        return -(-len(self.values) // 16)

    def slices(self) -> list[tuple[int, int]]:
        """(offset, bytes of an item) of every slice of k."""
        unit_k, unit_bytes = fragments.unit_k(self.fmt), fragments.unit_bytes(self.fmt)
        units = -(-self.values.shape[1] // unit_k)
        items = [min(2048 // unit_k, units - begin) * unit_bytes for begin in range(0, units, 2048 // unit_k)]
        return [(sum(items[:i]) * self.n_tiles, n_bytes) for i, n_bytes in enumerate(items)]


def random_matrix(rng: np.random.Generator, name: str, n_out: int, k: int, most: int) -> Matrix:
    """Whole numbers up to `most`; of quantized formats codes times scales of 1/2, 1 or 2."""
    fmt = ALL_FORMATS[name]
    if not fmt.scale_group:
        plain = rng.integers(-most, most + 1, (n_out, k)).astype(np.float32)
        bits = from_f32(plain, fmt).view(np.uint16)
        return Matrix(fmt, plain.astype(np.float64), _pack(fmt, bits, None, None))
    groups = -(-k // fmt.scale_group)
    scales = rng.choice(np.array([0.5, 1, 2], np.float16), (n_out, groups))
    zeros = np.full((n_out, groups), fmt.zero, np.int64)
    if fmt.zero_points:
        zeros = rng.integers(0, 16, (n_out, groups))
    every = np.repeat(zeros, fmt.scale_group, axis=1)[:, :k]
    low, high = np.maximum(every - most, 1 if fmt.bits == 8 else 0), np.minimum(every + most, (1 << fmt.bits) - 1)
    codes = rng.integers(low, high + 1)
    values = (codes - every) * np.repeat(scales.astype(np.float64), fmt.scale_group, axis=1)[:, :k]
    return Matrix(fmt, values, _pack(fmt, codes, scales, zeros))


def _pack(
    fmt: Format, codes: NDArray[Any], scales: NDArray[np.float16] | None, zeros: NDArray[np.int64] | None
) -> NDArray[np.uint8]:
    """Slices outermost, tiles inside; padding holds zero elements, of codes those of a group with scale 0."""
    unit_k = fragments.unit_k(fmt)
    n_out, k = codes.shape
    rows, width = padded(n_out, 16), padded(k, unit_k)
    full = np.zeros((rows, width), codes.dtype)
    full[:n_out, :k] = codes
    per_unit = unit_k // fmt.scale_group if fmt.scale_group else 0
    groups = width // unit_k * per_unit
    scale, zero = np.zeros((rows, groups), np.float16), np.full((rows, groups), fmt.zero, np.uint8)
    if scales is not None and zeros is not None:
        scale[:n_out, : scales.shape[1]], zero[:n_out, : zeros.shape[1]] = scales, zeros
        every = np.repeat(zero, fmt.scale_group, axis=1)
        full[n_out:], full[:, k:] = every[n_out:], every[:, k:]
    parts = []
    for begin in range(0, width, 2048):
        for tile in range(0, rows, 16):
            for at in range(begin, min(begin + 2048, width), unit_k):
                parts.append(_unit_codes(fmt, full[tile : tile + 16, at : at + unit_k]))
                if per_unit:
                    here = slice(at // fmt.scale_group, at // fmt.scale_group + per_unit)
                    parts.append(np.ascontiguousarray(scale[tile : tile + 16, here].T).view(np.uint8).ravel())
                    if fmt.zero_points:
                        parts.append(np.ascontiguousarray(zero[tile : tile + 16, here].T).ravel())
    return np.concatenate(parts)


def _unit_codes(fmt: Format, block: NDArray[Any]) -> NDArray[np.uint8]:
    """(16, unit_k) -> bytes; g, q: the lane 4 g + q that reads them."""
    if fmt.bits == 16:
        return np.ascontiguousarray(block.astype(np.uint16)).view(np.uint8).ravel()
    step = 32 if fmt.bits == 8 else 64
    parts = []
    for at in range(0, block.shape[1], step):
        piece = block[:, at : at + step].astype(np.uint32)
        if fmt.bits == 8:
            lanes = piece.reshape(2, 8, 4, 8).transpose(1, 2, 0, 3)  # half, g, q, e -> g, q, half, e
            parts.append(lanes.astype(np.uint8).ravel())
            continue
        eights = piece.reshape(2, 8, 2, 4, 8).transpose(1, 3, 0, 2, 4)  # half, g, part, q, e -> g, q, half, part, e
        nibble = np.array([e // 2 + 4 * (e % 2) for e in range(8)], np.uint32)
        words = (eights << (4 * nibble)).sum(axis=-1).astype(np.uint32)
        parts.append(np.ascontiguousarray(words).view(np.uint8).ravel())
    return np.concatenate(parts)


def as_input(x: NDArray[Any], fmt: Format) -> NDArray[np.float64]:
    """(rows, k) as the product sees them: bf16, or f16 with a power of two for every 2048 elements of a row."""
    if fmt is BF16:
        return round_to(x.astype(np.float32), BF16).astype(np.float64)
    result = np.zeros(x.shape)
    for begin in range(0, x.shape[1], 2048):
        part = x[:, begin : begin + 2048].astype(np.float64)
        largest = np.abs(part).max(axis=1, keepdims=True)
        scale = 2.0 ** np.minimum(14 - np.floor(np.log2(np.where(largest > 0, largest, 1))), 126)
        result[:, begin : begin + 2048] = (part * scale).astype(np.float16).astype(np.float64) / scale
    return result


# ---- phases and their memory


@dataclass(frozen=True)
class Step:
    """A phase: its product, and what else its record says. `spans`: tiles of each block; None: dealt evenly."""

    op: Op
    matrix: Matrix
    bias: F32Array | None = None
    norm: F32Array | None = None
    fold: str = ""  # buffer
    fold_norm: F32Array | None = None
    to: str = ""
    layer: int = 0
    spans: Sequence[int] | None = None
    record: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """Widths of the model; rows are those of the forward."""

    rows: int
    d_model: int
    d_ff: int = 64
    qkv: int = 64
    vocab_size: int = 64
    n_heads: int = 2
    head_dim: int = 32
    ctx: int = 700
    n_layers: int = 3


def switches(shape: Shape, steps: Sequence[Step]) -> dict[str, int]:
    """What the phases need."""
    fours = all(step.matrix.values.shape[1] % 4 == 0 for step in steps) and shape.head_dim % 4 == 0
    folds = any(step.fold for step in steps)
    return {"kFours": int(fours), "kUsesFolds": int(folds), "kUsesQkNorm": 0, "kUsesScoreCap": 0}


def header(
    formats: tuple[str, str], n_rows: int, n_blocks: int, n_slots: int, acc_tiles: int, more_tiles: int,
    switched: Mapping[str, int],
) -> str:  # fmt: skip
    """The text of specialization.h. `formats` of the layers and the head."""
    by_name = {"Body": ALL_FORMATS[formats[0]], "Head": ALL_FORMATS[formats[1]]}
    slot = max(fragments.slot_units(f) * fragments.unit_bytes(f) for f in by_name.values())
    slot = padded(slot, 128)
    constants = {"kRows": n_rows, "kCols": specialize.columns(n_rows), "kWorkers": n_blocks, "kTimes": 1}
    for name, fmt in by_name.items():
        constants |= {
            f"k{name}Format": fmt.code,
            f"k{name}Group": fmt.scale_group,
            f"k{name}ZeroPoints": int(fmt.zero_points),
            f"k{name}UnitBytes": fragments.unit_bytes(fmt),
            f"k{name}UnitK": fragments.unit_k(fmt),
            f"k{name}SlotUnits": fragments.slot_units(fmt),
        }
    places = specialize._places(n_rows, acc_tiles, n_slots, slot, AREA_BYTES)
    assert places["kSmemBytes"] <= SHARED_LIMIT
    constants |= {"kEmbedFormat": 1, "kKvFormat": 1, "kHeadDimPadded": 32} | switched
    constants |= {"kSlots": n_slots, "kSlotBytes": slot}
    constants |= places
    constants |= {
        "kXStride": specialize.X_STRIDE,
        "kXBytes": n_rows * specialize.X_STRIDE,
        "kPartialBytes": specialize._partial_bytes(n_rows),
        "kAccTiles": acc_tiles,
        "kMoreAccTiles": more_tiles,
        "kSmallBytes": specialize.SMALL_BYTES,
    }
    lines = [f"constexpr unsigned {name} = {value};" for name, value in constants.items()]
    return "\n".join(["#pragma once", "namespace flashformer {", *lines, "}", ""])


class LaunchArgument(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * LAUNCH.itemsize)]


class Forward:
    """Phases with the memory they share. Fill the buffers, `run`, read the buffers.

    Everything starts as NaN but what the kernel may rely on: the padding of the residual is zero.
    """

    def __init__(
        self,
        shape: Shape,
        steps: Sequence[Step],
        n_blocks: int,
        *,
        n_rows: int = 0,
        n_slots: int = 3,
        acc_tiles: int = 2,
        more_tiles: int = 8,
        **options: int,
    ) -> None:
        self.shape, self.steps, self.n_blocks = shape, steps, n_blocks
        n_rows = n_rows or min(n for n in specialize.ROW_COUNTS if shape.rows <= n)
        body = next((s.matrix.fmt.name for s in steps if s.op is not Op.LM_HEAD), steps[0].matrix.fmt.name)
        head = next((s.matrix.fmt.name for s in steps if s.op is Op.LM_HEAD), body)
        switched = switches(shape, steps)
        text = header((body, head), n_rows, n_blocks, n_slots, acc_tiles, more_tiles, switched)
        places = specialize._places(n_rows, acc_tiles, n_slots, int(_constant(text, "kSlotBytes")), AREA_BYTES)
        self.library: Path = build(text, [])
        self.simulator = Simulator(self.library, n_blocks, places["kSmemBytes"], **options)
        self._make_buffers()
        self._make_weights()
        self._make_records()
        self.launch = np.zeros(1, LAUNCH)
        self.launch["pos"] = np.arange(16)
        self.launch["top_p"] = 1
        self.launch["want"][:, : shape.rows] = 1
        self.launch["head_row"] = np.arange(16)
        self.launch["n_head_rows"] = shape.rows
        self.launch["n_rows"], self.launch["n_phases"] = shape.rows, len(steps)
        self.launch["base"], self.launch["spin_limit"] = BASE, 1 << 40
        self.counter, self.report = aligned(1, np.uint32), aligned(8 + n_blocks, np.uint32)
        self.failed = aligned(1, np.uint32)
        self.counter[0] = BASE
        self.accumulators = aligned((n_blocks, more_tiles, n_rows * 16), np.float32)
        self.accumulators[:] = np.nan
        self.times = aligned((n_blocks, len(steps), 2), np.uint64)
        self._register(places)

    def _make_buffers(self) -> None:
        shape, rows, chunks = self.shape, 16, -(-self.shape.ctx // 256)
        stride = padded(shape.head_dim, 32)
        results = rows * shape.n_heads * chunks
        sizes = {
            "residual": (rows, padded(shape.d_model)),
            "attention_out": (rows, padded(shape.d_model)),
            "ffn_out": (rows, padded(shape.d_model)),
            "qkv": (rows, padded(shape.qkv)),
            "partial": (results * (stride + 2),),
            "hidden": (rows, padded(shape.d_ff)),
            "logits": (rows, padded(shape.vocab_size)),
            "candidates": (self.n_blocks, rows, 2),
        }
        self.offsets, end = {}, 0
        for name, size in sizes.items():
            self.offsets[name], end = end, end + padded(4 * int(np.prod(size)))
        self.work = aligned(end, np.uint8)
        self.work.view(np.float32)[:] = np.nan
        view = {n: self.work[self.offsets[n] :][: 4 * int(np.prod(s))].view(np.float32) for n, s in sizes.items()}
        self.buffer = {name: array.reshape(sizes[name]) for name, array in view.items()}
        self.partial = view["partial"][: results * stride].reshape(rows, shape.n_heads, chunks, stride)
        for name in ("residual", "attention_out", "ffn_out"):
            self.buffer[name][:, shape.d_model :] = 0

    def _make_weights(self) -> None:
        """Matrices, then vectors, each from a whole cache line on."""
        self._places: dict[int, int] = {}
        parts: list[NDArray[np.uint8]] = []
        end = 0
        vectors = [v for s in self.steps for v in (s.bias, s.norm, s.fold_norm) if v is not None]
        for owner in [*(s.matrix.packed for s in self.steps), *vectors]:
            data = np.ascontiguousarray(owner)
            if data.dtype == np.float32:
                data = np.concatenate([data, np.zeros(padded(len(data)) - len(data), np.float32)])
            raw = data.view(np.uint8).ravel()
            self._places[id(owner)] = end
            parts.append(np.concatenate([raw, np.zeros(padded(len(raw), 128) - len(raw), np.uint8)]))
            end += len(parts[-1])
        self.weights = aligned(end, np.uint8)
        self.weights[:] = np.concatenate(parts)

    def _place(self, owner: NDArray[Any] | None) -> int:
        return NOTHING if owner is None else self._places[id(owner)]

    def _make_records(self) -> None:
        shape, n_phases = self.shape, len(self.steps)
        self.model, self.phases = aligned(1, MODEL), aligned(n_phases, PHASE)
        chunks = -(-shape.ctx // 256)
        values = {
            "n_workers": self.n_blocks, "n_phases": n_phases, "head_begin": n_phases, "rows": 16, "streams": 1,
            "ctx": shape.ctx, "chunks": chunks, "d_model": shape.d_model, "d_model_stride": padded(shape.d_model),
            "qkv_stride": padded(shape.qkv), "hidden_stride": padded(shape.d_ff), "vocab_size": shape.vocab_size,
            "logits_stride": padded(shape.vocab_size), "n_heads_max": shape.n_heads,
            "partial_stride": padded(shape.head_dim, 32), "n_layers": shape.n_layers,
        }  # fmt: skip
        for name, value in {**values, **{n: o for n, o in self.offsets.items() if n in (MODEL.names or ())}}.items():
            self.model[name] = value
        self.schedule = aligned((n_phases, self.n_blocks), SPAN)
        tapes: list[list[tuple[int, int, int]]] = [[] for _ in range(self.n_blocks)]
        for p, step in enumerate(self.steps):
            self._phase_record(step, self.phases[p])
            counts = step.spans or [len(a) for a in np.array_split(range(step.matrix.n_tiles), self.n_blocks)]
            assert sum(counts) == step.matrix.n_tiles
            for b in range(self.n_blocks):
                begin, end = sum(counts[:b]), sum(counts[: b + 1])
                self.schedule[p, b] = (begin, end, 1, self.n_blocks * p)
                for offset, n_bytes in step.matrix.slices() if begin < end else ():
                    first = self._place(step.matrix.packed) + offset
                    tapes[b].append((p, first + begin * n_bytes, first + end * n_bytes))
        self.tapes = aligned(max(sum(map(len, tapes)), 1), TAPE)
        self.tapes[: sum(map(len, tapes))] = np.array([item for tape in tapes for item in tape], TAPE)
        self.tape_begin = aligned(self.n_blocks + 1, np.int64)
        self.tape_begin[1:] = np.cumsum([len(tape) for tape in tapes])

    def _phase_record(self, step: Step, record: np.void) -> None:
        matrix, fmt, shape = step.matrix, step.matrix.fmt, self.shape
        n_out, k = matrix.values.shape
        values: dict[str, float] = {
            "op": OPS[step.op].code, "layer": step.layer, "n_units": matrix.n_tiles,
            "matrix": self._place(matrix.packed), "tile_bytes": sum(n for _, n in matrix.slices()), "vectors": 1,
            "k": k, "k_padded": padded(k, fragments.unit_k(fmt)), "n_out": n_out, "format": fmt.code,
            "scale_group": fmt.scale_group, "zero_points": fmt.zero_points, "zero": fmt.zero,
            "norm": self._place(step.norm), "bias": self._place(step.bias),
            "fold": self.offsets[step.fold] if step.fold else NOTHING, "fold_norm": self._place(step.fold_norm),
            "to": self.offsets[step.to] if step.to else NOTHING,
            "n_heads": shape.n_heads, "n_kv_heads": 1, "head_dim": shape.head_dim, "window": shape.ctx,
            "n_slices": len(matrix.slices()), "unit_k": fragments.unit_k(fmt), "unit_bytes": fragments.unit_bytes(fmt),
            "slot_units": fragments.slot_units(fmt), "scale": 1.0, "fold_scale": 1.0,
        }  # fmt: skip
        for name, value in {**values, **step.record}.items():
            record[name] = value

    def _register(self, places: Mapping[str, int]) -> None:
        constant = {n: getattr(self, n) for n in ("weights", "model", "phases", "schedule", "tapes", "tape_begin")}
        mutable = {n: getattr(self, n) for n in ("work", "counter", "report", "failed", "accumulators", "times")}
        for name, array in constant.items():
            self.launch[name] = self.simulator.constant(array.reshape(-1).view(np.uint8), name)
        for name, array in mutable.items():
            self.launch[name] = self.simulator.mutable(array.reshape(-1).view(np.uint8), name)
        self.simulator.abort_flag(self.report.ctypes.data)
        ends = [*list(places.values())[1:], places["kSmemBytes"]]
        for (name, begin), end in zip(places.items(), ends, strict=True):
            if end > begin:
                self.simulator.name_shared(begin, end - begin, name)

    def run(self) -> str:
        """One launch. What the simulator found, or an empty text."""
        return self.simulator.run(LaunchArgument.from_buffer_copy(self.launch.tobytes()))


def _constant(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if f" {name} =" in line).split("= ")[1].rstrip(";")
