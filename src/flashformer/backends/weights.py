"""What packers of checkpoint arrays share: vectors, rope tables, and what to say of a weight that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.tensor import Tensor
from ..errors import LoadError
from ..formats import Format, to_f32
from ..model.rope import rope_table
from ..program.ir import Phase, Program
from ..program.memory import rope_offsets
from ..program.records import rope_begin


def fill_vectors(
    weights_region: NDArray[np.uint8],
    phase: Phase,
    weights: Mapping[str, Tensor],
    row_map: NDArray[np.int32] | None,
) -> None:
    """Norms, and biases in the packed order of `row_map`, as f32. Raises LoadError for what is NaN or Inf."""
    for name, vector in phase.vectors.items():
        values = np.concatenate([_finite_vector(weights[role]) for role in vector.roles])
        if name == "bias":
            values = np.append(values, np.float32(0))[row_map]  # -1 picks the zero
        weights_region[vector.offset :][: values.nbytes].view(np.float32)[:] = values


def rope_tables(program: Program) -> list[tuple[int, NDArray[np.float32]]]:
    """(offset in the work region, cos and sin of every position) of each rotation, (ctx, 2, rotary_dim / 2)."""
    offsets, _ = rope_offsets(program.spec, program.target.ctx)
    return [(rope_begin(program) + at, rope_table(rope, program.target.ctx)) for rope, at in offsets.items()]


def common_format(tensors: list[Tensor]) -> Format:
    """Of the tensors of one product. Raises LoadError where they differ."""
    formats = {tensor.format for tensor in tensors}
    if len(formats) > 1:
        names = ", ".join(f"{t.name} {t.format.name}" for t in tensors)
        raise LoadError(f"tensors of one product differ in dtype: {names}; store them alike")
    return formats.pop()


def bad_row(tensors: list[Tensor], stacked_row: int) -> LoadError:
    """The error for a row of stacked tensors in which something is not finite."""
    row = stacked_row
    for tensor in tensors:
        if row < tensor.shape[0]:
            return bad_value(tensor, row)
        row -= tensor.shape[0]
    raise AssertionError(f"row {stacked_row} is outside {[tensor.name for tensor in tensors]}")


def bad_value(tensor: Tensor, row: int) -> LoadError:
    """Names the first element of a row that is not finite, in the file or once rounded."""
    values = to_f32(tensor.rows(row, row + 1)[0], tensor.format)
    bad = np.argwhere(~np.isfinite(values))
    index = [row, *(bad[0].tolist() if len(bad) else [])]
    what = "NaN or Inf" if len(bad) else "too large for the format asked for"
    return LoadError(f"tensor {tensor.name}: element {index} is {what}; every weight must be finite. Check the file")


def _finite_vector(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = to_f32(np.ascontiguousarray(tensor.data), tensor.format)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise bad_value(tensor, int(bad[0]))
    return values
