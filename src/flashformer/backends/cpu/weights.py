"""Checkpoint arrays -> the weights region of a Program (tiles, embedding rows, fp32 vectors); and the rope table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...checkpoint.tensor import Stored, Tensor
from ...errors import LoadError
from ...formats import to_f32
from ...model.rope import rope_table
from ...program.ir import PackedMatrix, Program
from ...program.memory import rope_offsets
from ...program.pack import row_map
from ...program.records import rope_begin
from ..packed import Progress

READ_FAILED = -2  # csrc/pack.h


def pack_weights(
    native: Any,
    program: Program,
    weights: Mapping[str, Tensor],
    n_threads: int,
    isa: str,
    progress: Progress | None,
    region: Any,
) -> None:
    """Fills `region` as the Program places things. Raises LoadError for a weight that is NaN or Inf."""
    for phase in program.phases:
        if progress is not None and phase.matrix is not None:
            progress("packing", phase.matrix.offset, program.memory.weights_bytes)
        rows = None
        if (matrix := phase.matrix) is not None:
            rows = row_map(matrix)
            tensors = [weights[role] for role in matrix.roles]
            result = native.pack(
                region=region,
                offset=matrix.offset,
                format=matrix.format.code,
                scale_group=matrix.format.scale_group,
                group_bytes=matrix.format.group_bytes(matrix.vectors),
                zero_points=matrix.format.zero_points,
                zero=matrix.format.zero,
                vectors=matrix.vectors,
                n_tiles=matrix.n_tiles,
                k=matrix.k,
                k_padded=matrix.k_padded,
                row_map=rows,
                sources=[_source(tensor) for tensor in tensors],
                source_format=_common_format(tensors),
                isa=isa,
                n_threads=n_threads,
            )
            _require_read(tensors, result)
            if result >= 0:
                raise _not_finite(matrix, tensors, result)
        for name, vector in phase.vectors.items():
            values = np.concatenate([_finite_vector(weights[role]) for role in vector.roles])
            if name == "bias":
                values = np.append(values, np.float32(0))[rows]  # -1 picks the zero
            region.array[vector.offset :][: values.nbytes].view(np.float32)[:] = values
    if program.embed_offset >= 0:
        embed = weights["embed"]
        result = native.copy(
            region=region,
            offset=program.embed_offset,
            format=program.target.weight_format.code,
            k=program.spec.d_model,
            rows=_source(embed),
            source_format=embed.format.code,
            n_threads=n_threads,
        )
        _require_read([embed], result)
        if result >= 0:
            raise _bad_value(embed, result)
    if progress is not None:
        progress("packing", program.memory.weights_bytes, program.memory.weights_bytes)


def fill_ropes(work: Any, program: Program) -> None:
    """cos and sin of every position, (ctx, 2, rotary_dim / 2) f32 per rotation, into the work region."""
    offsets, _ = rope_offsets(program.spec, program.target.ctx)
    for rope, offset in offsets.items():
        table = rope_table(rope, program.target.ctx)
        work.array[rope_begin(program) + offset :][: table.nbytes].view(np.float32)[:] = table.ravel()


def _source(tensor: Tensor) -> Any:
    """A matrix as native code takes it: in memory, or where it lies in its file."""
    if not isinstance(tensor.source, Stored):
        return tensor.source
    rows, k = tensor.shape
    return tensor.source.file.fd, tensor.source.offset, rows, k * tensor.format.element_bytes


def _require_read(tensors: list[Tensor], result: int) -> None:
    """Raises LoadError if a file could not be read to the end, or changed under the reader."""
    for tensor in tensors:
        if isinstance(tensor.source, Stored):
            tensor.source.file.require_unchanged()
    if result == READ_FAILED:
        names = ", ".join(tensor.name for tensor in tensors)
        raise LoadError(f"{names}: the file cannot be read: check the disk, or download it again")


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
        if row < tensor.shape[0]:
            return _bad_value(tensor, row)
        row -= tensor.shape[0]
    raise AssertionError(f"row {stacked_row} is outside {matrix.roles}")


def _bad_value(tensor: Tensor, row: int) -> LoadError:
    """Names the first element of a row that is not finite, in the file or once rounded."""
    values = to_f32(tensor.rows(row, row + 1)[0], tensor.format)
    bad = np.argwhere(~np.isfinite(values))
    index = [row, *(bad[0].tolist() if len(bad) else [])]
    what = "NaN or Inf" if len(bad) else "too large for the format asked for"
    return LoadError(f"tensor {tensor.name}: element {index} is {what}; every weight must be finite. Check the file")
