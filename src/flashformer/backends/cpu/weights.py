"""Checkpoint arrays -> the weights region of a Program: tiles, embedding rows, fp32 vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checkpoint.tensor import Stored, Tensor
from ...errors import LoadError
from ...program.ir import Program
from ...program.pack import row_map
from ..packed import Progress
from ..weights import bad_row, bad_value, common_format, fill_vectors

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
                source_format=common_format(tensors).code,
                isa=isa,
                n_threads=n_threads,
            )
            _require_read(tensors, result)
            if result >= 0:
                raise bad_row(tensors, result)
        fill_vectors(region.array, phase, weights, rows)
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
            raise bad_value(embed, result)
    if progress is not None:
        progress("packing", program.memory.weights_bytes, program.memory.weights_bytes)


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
