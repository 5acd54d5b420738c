"""The packed layout, as the definition that every packer and unpacker follows.

tile t, step s of k_group consecutive k, vector v, lane l, element e of the group:
packed[t, s, v, l, e] = stacked_sources[row_map[(t * vectors + v) * 16 + l], s * k_group + e]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
    """Raw elements of the stacked sources -> (n_tiles, steps, vectors, 16, k_group), padding zero."""
    group = matrix.format.k_group
    stacked = np.zeros((matrix.n_out + 1, matrix.k_padded), matrix.format.storage)
    stacked[: matrix.n_out, : matrix.k] = np.concatenate(sources)
    rows = stacked[row_map(matrix)]  # -1 picks the zero row
    tiles = rows.reshape(matrix.n_tiles, matrix.vectors, LANES, matrix.k_padded // group, group)
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 2, 4))
