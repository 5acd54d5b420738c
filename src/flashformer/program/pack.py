"""The packed layout, as the definition that every packer and unpacker follows.

Lanes: tile t, step s of k_group consecutive k, vector v, lane l, element e of the group:
packed[t, s, v, l, e] = stacked_sources[row_map[(t * vectors + v) * 16 + l], s * k_group + e]
Fragments: fragments.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quantize import quantize
from . import fragments
from .ir import LANES, Layout, Order, PackedMatrix

PACK_VERSION = 2  # of the layout below; a packed file of another one is packed anew


def row_map(matrix: PackedMatrix) -> NDArray[np.int32]:
    """(n_tiles * tile_outputs) source row of each packed output among the stacked sources, -1 for padding."""
    result = np.full(matrix.n_tiles * matrix.tile_outputs, -1, np.int32)
    if matrix.order is Order.ALTERNATE:
        half = matrix.n_out // 2
        row = np.arange(half)
        width = matrix.alternate
        place = row // width * 2 * width + row % width
        result[place] = row
        result[place + width] = row + half
        return result
    result[: matrix.n_out] = np.arange(matrix.n_out, dtype=np.int32)
    return result


def pack(matrix: PackedMatrix, sources: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    """Raw elements of the stacked sources -> (n_tiles, steps, vectors, 16, k_group), padding zero.

    Of a quantized format the sources are float32, and the result bytes, (n_tiles, groups, group_bytes). In fragments
    the result is always bytes, (n_bytes).
    """
    if matrix.layout is Layout.FRAGMENTS:
        return pack_fragments(matrix, np.concatenate(sources))
    if matrix.format.scale_group:
        return _pack_quantized(matrix, np.concatenate(sources).astype(np.float32, copy=False))
    group = matrix.format.k_group
    stacked = np.zeros((matrix.n_out + 1, matrix.k_padded), matrix.format.storage)
    stacked[: matrix.n_out, : matrix.k] = np.concatenate(sources)
    rows = stacked[row_map(matrix)]  # -1 picks the zero row
    tiles = rows.reshape(matrix.n_tiles, matrix.vectors, LANES, matrix.k_padded // group, group)
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 2, 4))


def _pack_quantized(matrix: PackedMatrix, stacked: NDArray[np.float32]) -> NDArray[np.generic]:
    """Per tile and group: scales (vectors, 16) f16, zeros (vectors, 16) if the format has them, codes
    (steps, vectors, 16, 4); each from a whole cache line on. The low nibbles of a step are its first four k.
    """
    fmt, rows = matrix.format, row_map(matrix)
    q = quantize(stacked, fmt)
    n_groups, lines = q.scales.shape[1], (matrix.n_tiles, matrix.vectors * LANES)

    def tiled(values: NDArray[Any]) -> NDArray[Any]:
        """(n_out, groups, ...) -> (n_tiles, groups, vectors * 16, ...), padding zero."""
        padded = np.concatenate([values, np.zeros_like(values[:1])])[rows]
        return padded.reshape(*lines, *values.shape[1:]).swapaxes(1, 2)

    result = np.zeros((matrix.n_tiles, n_groups, fmt.group_bytes(matrix.vectors)), np.uint8)
    scales = np.ascontiguousarray(tiled(q.scales)).view(np.uint8)
    result[:, :, : scales.shape[2]] = scales
    if fmt.zero_points:
        zeros = tiled(q.zeros)
        begin = -(-scales.shape[2] // 64) * 64
        result[:, :, begin : begin + zeros.shape[2]] = zeros
    codes = tiled(q.codes.reshape(len(stacked), n_groups, -1, fmt.k_group))  # (tiles, groups, outputs, steps, k_group)
    if fmt.bits == 4:
        codes = codes[..., :4] | codes[..., 4:] << 4
    packed = np.ascontiguousarray(codes.swapaxes(2, 3)).reshape(matrix.n_tiles, n_groups, -1)
    result[:, :, -packed.shape[2] :] = packed
    return result


def pack_fragments(matrix: PackedMatrix, stacked: NDArray[np.generic]) -> NDArray[np.uint8]:
    """(n_out, k) raw elements, or float32 of a quantized format -> (n_bytes), padding zero."""
    fmt, unit_k = matrix.format, fragments.unit_k(matrix.format)
    if fmt.scale_group:
        q = quantize(stacked.astype(np.float32, copy=False), fmt)
        codes = _fragment_codes(_units(matrix, q.codes, unit_k, fmt.zero), fmt.bits)
        parts = [codes, _group_major(_units(matrix, q.scales, unit_k // fmt.scale_group))]
        if fmt.zero_points:
            parts.append(_group_major(_units(matrix, q.zeros, unit_k // fmt.scale_group)))
        units = np.concatenate(parts, axis=2)
    else:
        elements = _units(matrix, stacked, unit_k).swapaxes(1, 2)
        units = np.ascontiguousarray(elements).view(np.uint8).reshape(matrix.n_tiles, -1, fragments.unit_bytes(fmt))
    per_slice = fragments.SLICE_K // unit_k
    items = [units[:, at : at + per_slice].reshape(-1) for at in range(0, units.shape[1], per_slice)]
    return np.concatenate(items)


def _units(matrix: PackedMatrix, values: NDArray[Any], per_unit: int, fill: int = 0) -> NDArray[Any]:
    """(n_out, n) -> (n_tiles, 16, units, per_unit) in packed order."""
    n_units = matrix.k_padded // fragments.unit_k(matrix.format)
    padded = np.full((len(values) + 1, n_units * per_unit), fill, values.dtype)
    padded[:-1, : values.shape[1]] = values  # -1 of the row map picks the last row
    return padded[row_map(matrix)].reshape(matrix.n_tiles, fragments.TILE_OUTPUTS, n_units, per_unit)


def _group_major(values: NDArray[Any]) -> NDArray[np.uint8]:
    """(n_tiles, 16, units, groups) -> (n_tiles, units, bytes of (groups, 16))"""
    n_tiles, _, n_units, _ = values.shape
    return np.ascontiguousarray(values.transpose(0, 2, 3, 1)).view(np.uint8).reshape(n_tiles, n_units, -1)


def _fragment_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(n_tiles, 16, units, unit_k) -> (n_tiles, units, bytes): lanes 4 g + q, rows g and g + 8."""
    n_tiles, _, n_units, unit_k = codes.shape
    if bits == 8:
        lanes = codes.reshape(n_tiles, 2, 8, n_units, unit_k // 32, 4, 8)  # half, g, unit, step, q, e
        return np.ascontiguousarray(lanes.transpose(0, 3, 4, 2, 5, 1, 6)).reshape(n_tiles, n_units, -1)
    lanes = codes.reshape(n_tiles, 2, 8, n_units, unit_k // 64, 2, 4, 4, 2)  # half, g, unit, step, run, q, e / 2, e % 2
    words = lanes.transpose(0, 3, 4, 2, 6, 1, 5, 7, 8).astype(np.uint32)  # ..., g, q, half, run, e / 2, e % 2
    shifts = 4 * (np.arange(4)[:, None] + 4 * np.arange(2))
    packed = (words << shifts.astype(np.uint32)).sum(axis=(-2, -1), dtype=np.uint32)
    return np.ascontiguousarray(packed).view(np.uint8).reshape(n_tiles, n_units, -1)
