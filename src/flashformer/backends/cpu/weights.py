"""Checkpoint arrays -> the weights region of a Program (tiles, embedding rows, fp32 vectors); and the rope table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...checkpoint import Tensor
from ...errors import LoadError
from ...formats import to_f32
from ...model.rope import rope_table
from ...program.ir import PackedMatrix, Program
from ...program.pack import row_map
from ...program.records import FlatProgram


def pack_weights(native: Any, region: Any, program: Program, weights: Mapping[str, Tensor], n_threads: int) -> None:
    """Fills `region` as the Program places things. Raises LoadError for a weight that is NaN or Inf."""
    for phase in program.phases:
        rows = None
        if (matrix := phase.matrix) is not None:
            rows = row_map(matrix)
            tensors = [weights[role] for role in matrix.roles]
            bad = native.pack(
                region=region,
                offset=matrix.offset,
                format=matrix.format.code,
                vectors=matrix.vectors,
                n_tiles=matrix.n_tiles,
                k=matrix.k,
                k_padded=matrix.k_padded,
                row_map=rows,
                sources=[tensor.data for tensor in tensors],
                source_format=_common_format(tensors),
                n_threads=n_threads,
            )
            if bad >= 0:
                raise _not_finite(matrix, tensors, bad)
        for vector, order in ((phase.norm, None), (phase.bias, rows)):
            if vector is None:
                continue
            values = np.concatenate([_finite_vector(weights[role]) for role in vector.roles])
            if order is not None:
                values = np.append(values, np.float32(0))[order]  # -1 picks the zero
            region.array[vector.offset :][: values.nbytes].view(np.float32)[:] = values
    if program.embed_offset >= 0:
        embed = weights["embed"]
        code, source_code = program.target.weight_format.code, embed.format.code
        row = native.copy(region, program.embed_offset, code, embed.data, source_code, n_threads)
        if row >= 0:
            raise _bad_value(embed, row)


def fill_rope(work: Any, flat: FlatProgram, program: Program) -> None:
    """cos and sin of every position, (ctx, head_dim / 2, 2) f32, into the work region."""
    table = rope_table(program.spec.rope, program.spec.layers[0].head_dim, program.target.ctx)
    begin = int(flat.model["rope"][0])
    work.array[begin:][: table.nbytes].view(np.float32)[:] = table.ravel()


def _common_format(tensors: list[Tensor]) -> int:
    formats = {tensor.format for tensor in tensors}
    if len(formats) > 1:
        names = ", ".join(f"{t.name} {t.format.name}" for t in tensors)
        raise LoadError(f"tensors of one product differ in dtype: {names}; store them alike")
    return formats.pop().code


def _finite_vector(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = to_f32(np.ascontiguousarray(tensor.data), tensor.format)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise _bad_value(tensor, int(bad[0]))
    return values


def _not_finite(matrix: PackedMatrix, tensors: list[Tensor], stacked_row: int) -> LoadError:
    row = stacked_row
    for tensor in tensors:
        if row < tensor.data.shape[0]:
            return _bad_value(tensor, row)
        row -= tensor.data.shape[0]
    raise AssertionError(f"row {stacked_row} is outside {matrix.roles}")


def _bad_value(tensor: Tensor, row: int) -> LoadError:
    """Names the first element of a row that is not finite, in the file or once rounded."""
    values = to_f32(np.asarray(tensor.data[row]), tensor.format)
    bad = np.argwhere(~np.isfinite(values))
    index = [row, *(bad[0].tolist() if len(bad) else [])]
    what = "NaN or Inf" if len(bad) else "too large for the format asked for"
    return LoadError(f"tensor {tensor.name}: element {index} is {what}; every weight must be finite. Check the file")
