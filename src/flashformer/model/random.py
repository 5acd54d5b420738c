"""`shape:NAME`: the widths of a well-known model with random weights that take almost no memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Tensor
from ..errors import LoadError
from ..formats import BF16, from_f32

PREFIX = "shape:"
ROW_STEP = 37  # elements from one row to the next; odd and no multiple of a vector, so no two rows are alike
MATRIX_STEP = 101
STD = 0.02
SEED = 0

_FOLDER = Path(__file__).parent / "shapes"


def shape_names() -> list[str]:
    """Names that may follow `shape:`."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def shape_config(name: str) -> dict[str, Any]:
    """The config.json of a named shape, without `shape:`. Raises LoadError listing the names."""
    if name not in shape_names():
        raise LoadError(f"{PREFIX}{name}: no such shape; there are: {', '.join(shape_names())}")
    config: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return config


class RandomWindows:
    """Matrices that are overlapping read-only windows of one block of bf16 values, normal with std STD.

    Row r of matrix i begins at element i * MATRIX_STEP + r * ROW_STEP of the block, so that a matrix of
    128256 x 2048 needs 9.5 MB instead of 525.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]], seed: int = SEED) -> None:
        shapes = list(shapes)
        size = max(rows * ROW_STEP + k for rows, k in map(_as_matrix, shapes)) + len(shapes) * MATRIX_STEP
        noise = np.random.default_rng(seed).standard_normal(size, np.float32) * np.float32(STD)
        self._block: NDArray[Any] = from_f32(noise, BF16)
        self._n_made = 0

    def make(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The next matrix or vector."""
        begin = self._n_made * MATRIX_STEP
        self._n_made += 1
        rows, k = _as_matrix(shape)
        strides = (ROW_STEP * self._block.itemsize, self._block.itemsize)
        data = np.lib.stride_tricks.as_strided(self._block[begin:], (rows, k), strides, writeable=False)
        return Tensor(name, BF16, data[0] if len(shape) == 1 else data)


def ones(name: str, shape: tuple[int, ...]) -> Tensor:
    """Norm weights."""
    data = from_f32(np.ones(shape, np.float32), BF16)
    data.flags.writeable = False
    return Tensor(name, BF16, data)


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
