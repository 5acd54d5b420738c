"""Checkpoint arrays -> the weights region of a Program in the fragment layout; program/fragments.py is the definition.

Work is cut into pieces of whole tiles, which threads take. A piece gathers its rows in packed order and padded, then
copies them into its units: runs of 64 bytes for 16-bit formats. Quantized formats use the quantizer of the CPU
extension where it is installed, whose codes are those of quantize.py, and otherwise quantize.py itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import env
from ...checkpoint.tensor import Tensor
from ...formats import Format, from_f32, to_f32
from ...program import fragments
from ...program.ir import PackedMatrix, Program
from ...program.pack import row_map
from ...quantize import Quantized, quantize
from ..packed import Progress
from ..weights import bad_row, bad_value, common_format, fill_vectors

Bytes = NDArray[np.uint8]
Piece = tuple[Callable[[], None], int]  # what to do, and where in the weights it ends

PIECE_BYTES = 4 << 20  # of packed weights: stays in a core's cache between the gather and the copy
LINE = 64  # bytes of a zero, scale or code line of the CPU layout (formats.py)


def pack_weights(
    region: Bytes,
    program: Program,
    weights: Mapping[str, Tensor],
    n_threads: int,
    progress: Progress | None = None,
    *,
    native: Any = None,
) -> None:
    """Fills `region` as the Program places things; `native` is the CPU extension or None.

    Raises LoadError for a weight that is NaN or Inf, or cannot be read.
    """
    for phase in program.phases:
        fill_vectors(region, phase, weights, row_map(phase.matrix) if phase.matrix else None)
    with ThreadPoolExecutor(n_threads) as pool:
        pieces = list(_pieces(region, program, weights, native))
        futures = [pool.submit(work) for work, _ in pieces]
        try:
            for (_, end), future in zip(pieces, futures, strict=True):
                future.result()
                if progress is not None:
                    progress("packing", end, program.memory.weights_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
    if progress is not None:
        progress("packing", program.memory.weights_bytes, program.memory.weights_bytes)


def _pieces(region: Bytes, program: Program, weights: Mapping[str, Tensor], native: Any) -> Iterator[Piece]:
    for phase in program.phases:
        if (matrix := phase.matrix) is not None:
            tensors = [weights[role] for role in matrix.roles]
            common_format(tensors)
            rows = row_map(matrix)
            per_piece = max(1, PIECE_BYTES // matrix.tile_bytes)
            for begin in range(0, matrix.n_tiles, per_piece):
                end = min(begin + per_piece, matrix.n_tiles)
                yield _matrix_piece(region, matrix, tensors, rows, begin, end, native), matrix.offset
    if program.embed_offset >= 0:
        embed, fmt = weights["embed"], program.target.weight_format
        per_piece = max(1, PIECE_BYTES // (program.spec.d_model * fmt.element_bytes))
        for begin in range(0, program.spec.vocab_size, per_piece):
            end = min(begin + per_piece, program.spec.vocab_size)
            yield _embed_piece(region, program.embed_offset, embed, fmt, begin, end), program.embed_offset


def _matrix_piece(
    region: Bytes,
    matrix: PackedMatrix,
    tensors: list[Tensor],
    all_rows: NDArray[np.int32],
    begin: int,
    end: int,
    native: Any,
) -> Callable[[], None]:
    """Packs tiles [begin, end)."""
    rows = all_rows[begin * fragments.TILE_OUTPUTS : end * fragments.TILE_OUTPUTS]

    def work() -> None:
        if matrix.format.scale_group:
            units = _quantized_units(matrix.format, *_quantize(matrix, tensors, rows, native))
        else:
            stored = _gather(tensors, rows, matrix.k_padded, matrix.format)
            if (bad := _first_bad_row(stored, matrix.format)) >= 0:
                raise bad_row(tensors, int(rows[bad]))
            units = _plain_units(stored)
        per_slice = fragments.SLICE_K // fragments.unit_k(matrix.format)
        for s, (at, to) in enumerate(matrix.ranges(begin, end)):
            some = units[:, s * per_slice : (s + 1) * per_slice]
            region[at:to].view(some.dtype).reshape(some.shape)[...] = some

    return work


def _embed_piece(region: Bytes, offset: int, embed: Tensor, fmt: Format, begin: int, end: int) -> Callable[[], None]:
    """Copies rows [begin, end) of the embedding."""

    def work() -> None:
        rows = _gather([embed], np.arange(begin, end), embed.shape[1], fmt)
        if (bad := _first_bad_row(rows, fmt)) >= 0:
            raise bad_value(embed, begin + bad)
        row_bytes = rows[0].nbytes
        region[offset + begin * row_bytes : offset + end * row_bytes] = rows.reshape(-1).view(np.uint8)

    return work


def _gather(tensors: Sequence[Tensor], rows: NDArray[Any], k: int, fmt: Format) -> NDArray[Any]:
    """(len(rows), k) in `fmt`: `rows` of the stacked tensors, zeros for row -1 and behind the end of a row."""
    result = np.empty((len(rows), k), fmt.storage)
    width = tensors[0].shape[1]
    result[:, width:] = 0
    result[rows < 0] = 0
    first = 0
    for tensor in tensors:
        mine = np.flatnonzero((rows >= first) & (rows < first + tensor.shape[0]))
        if len(mine):
            begin, end = int(rows[mine[0]]) - first, int(rows[mine[-1]]) - first + 1
            assert end - begin == len(mine), "packed outputs follow the rows of each source"
            result[mine, :width] = _converted(tensor.rows(begin, end), tensor.format, fmt)
        first += tensor.shape[0]
    return result


def _converted(data: NDArray[Any], source: Format, fmt: Format) -> NDArray[Any]:
    return data if source is fmt else from_f32(to_f32(data, source), fmt)


_EXPONENT = {"bf16": np.uint16(0x7F80), "f16": np.uint16(0x7C00)}  # of what is not finite


def _first_bad_row(values: NDArray[Any], fmt: Format) -> int:
    """The first row with a NaN or Inf, -1 if there is none."""
    exponent = _EXPONENT[fmt.name]
    found = np.bitwise_and(values.view(np.uint16), exponent)
    return int((found == exponent).any(axis=1).argmax()) if found.max() == exponent else -1


def _plain_units(stored: NDArray[Any]) -> NDArray[Any]:
    """(tiles * 16, k) of 16 bits -> (tiles, units, 16) runs of 64 bytes; a view."""
    runs = stored.view("V64")
    return runs.reshape(-1, fragments.TILE_OUTPUTS, runs.shape[1]).swapaxes(1, 2)


# ---- quantized formats ---------------------------------------------------------------------------------------------


def _quantize(matrix: PackedMatrix, tensors: list[Tensor], rows: NDArray[np.int32], native: Any) -> tuple[Any, ...]:
    """codes (tiles * 16, k padded to units), scales and zeros (tiles * 16, groups of it)."""
    fmt = matrix.format
    k = matrix.k
    if native is None:
        values = _gather_f32(tensors, rows, k)
        q = quantize(values, fmt)
        finite = np.isfinite(values).all(axis=1) & np.isfinite(q.scales).all(axis=1)
        bad = -1 if finite.all() else int(np.flatnonzero(~finite)[0])
    else:
        q, bad = _native_quantize(_gather(tensors, rows, k, tensors[0].format), tensors[0].format, fmt, native)
    if bad >= 0:
        raise bad_row(tensors, int(rows[bad]))
    codes = np.full((len(rows), matrix.k_padded), fmt.zero, np.uint8)
    codes[:, : q.codes.shape[1]] = q.codes
    groups = matrix.k_padded // fmt.scale_group
    scales, zeros = np.zeros((len(rows), groups), np.float16), np.zeros((len(rows), groups), np.uint8)
    scales[:, : q.scales.shape[1]], zeros[:, : q.zeros.shape[1]] = q.scales, q.zeros
    codes[rows < 0], scales[rows < 0], zeros[rows < 0] = fmt.zero, 0, 0
    return codes, scales, zeros


def _gather_f32(tensors: list[Tensor], rows: NDArray[np.int32], k: int) -> NDArray[np.float32]:
    stored = tensors[0].format
    return to_f32(_gather(tensors, rows, k, stored), stored).astype(np.float32, copy=False)


def _native_quantize(values: NDArray[Any], stored: Format, fmt: Format, native: Any) -> tuple[Quantized, int]:
    """(rows, k) raw elements -> codes, and the first row with something not finite or -1.

    The extension packs tiles of one vector; their lines are taken apart again.
    """
    n_rows, k = values.shape
    n_tiles, k_padded = n_rows // 16, -(-k // fmt.scale_group) * fmt.scale_group
    n_groups, size = k_padded // fmt.scale_group, fmt.group_bytes(1)
    region = native.Region(n_tiles * n_groups * size, resident=False)
    bad = native.pack(
        region=region,
        offset=0,
        format=fmt.code,
        scale_group=fmt.scale_group,
        group_bytes=size,
        zero_points=fmt.zero_points,
        zero=fmt.zero,
        vectors=1,
        n_tiles=n_tiles,
        k=k,
        k_padded=k_padded,
        row_map=np.arange(n_rows, dtype=np.int32),
        sources=[values],
        source_format=stored.code,
        isa=env.isa() or native.isas()[-1],
        n_threads=1,
    )
    lines = region.array.reshape(n_tiles, n_groups, size)
    scales = np.ascontiguousarray(lines[:, :, :32]).view(np.float16).swapaxes(1, 2)
    zeros = lines[:, :, LINE : LINE + 16].swapaxes(1, 2) if fmt.zero_points else np.zeros(scales.shape, np.uint8)
    packed = lines[:, :, size - fmt.scale_group // fmt.k_group * LINE :]
    packed = packed.reshape(n_tiles, n_groups, fmt.scale_group // fmt.k_group, 16, 4).transpose(0, 3, 1, 2, 4)
    if fmt.bits == 4:
        packed = np.concatenate([packed & 15, packed >> 4], axis=4)
    codes = packed.reshape(n_rows, k_padded)
    return Quantized(codes, scales.reshape(n_rows, n_groups), zeros.reshape(n_rows, n_groups)), int(bad)


def _quantized_units(
    fmt: Format, codes: NDArray[np.uint8], scales: NDArray[np.float16], zeros: NDArray[np.uint8]
) -> Bytes:
    """(tiles, units, unit_bytes)"""
    n_tiles, n_units = len(codes) // fragments.TILE_OUTPUTS, codes.shape[1] // fragments.unit_k(fmt)
    parts = [_lane_codes(codes, fmt.bits).reshape(n_tiles, n_units, -1)]
    for values in (scales, zeros) if fmt.zero_points else (scales,):
        by_group = values.reshape(n_tiles, fragments.TILE_OUTPUTS, -1).swapaxes(1, 2)
        parts.append(np.ascontiguousarray(by_group).view(np.uint8).reshape(n_tiles, n_units, -1))
    return np.concatenate(parts, axis=2)


def _lane_codes(codes: NDArray[np.uint8], bits: int) -> Bytes:
    """(tiles * 16, k) -> bytes in the order of lanes 4 g + q, which have rows g and g + 8."""
    if bits == 8:
        eights = codes.view("V8").reshape(-1, 2, 8, codes.shape[1] // 32, 4)  # tile, half, g, step, q
        return np.ascontiguousarray(eights.transpose(0, 3, 2, 4, 1)).view(np.uint8)
    e = codes.reshape(len(codes), -1, 2, 2, 2)  # elements 4 a + 2 b + c: byte 2 c + a, b = 0 in its low nibble
    octets = np.ascontiguousarray((e[:, :, :, 0] | e[:, :, :, 1] << 4).swapaxes(2, 3))
    words = octets.reshape(len(codes), -1).view(np.uint32)
    lanes = words.reshape(-1, 2, 8, codes.shape[1] // 64, 2, 4)  # tile, half, g, step, run, q
    return np.ascontiguousarray(lanes.transpose(0, 3, 2, 5, 1, 4)).view(np.uint8)
