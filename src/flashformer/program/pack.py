"""The packed layout, as the definition that every packer and unpacker follows.

tile t, step s of k_group consecutive k, vector v, lane l, element e of the group:
packed[t, s, v, l, e] = stacked_sources[row_map[(t * vectors + v) * 16 + l], s * k_group + e]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quantize import quantize
from .ir import LANES, Order, PackedMatrix

PACK_VERSION = 1  # of the layout below; a packed file of another one is packed anew


def row_map(matrix: PackedMatrix) -> NDArray[np.int32]:
    """(n_tiles * tile_outputs) source row of each packed output among the stacked sources, -1 for padding."""
    result = np.full(matrix.n_tiles * matrix.tile_outputs, -1, np.int32)
    if matrix.order is Order.ALTERNATE:
        half = matrix.n_out // 2
        row = np.arange(half)
        place = row // LANES * 2 * LANES + row % LANES
        result[place] = row
        result[place + LANES] = row + half
        return result
    result[: matrix.n_out] = np.arange(matrix.n_out, dtype=np.int32)
    return result


def pack(matrix: PackedMatrix, sources: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    """Raw elements of the stacked sources -> (n_tiles, steps, vectors, 16, k_group), padding zero.

    Of a quantized format the sources are float32, and the result bytes, (n_tiles, groups, group_bytes).
    """
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
