"""How far numbers are from those expected, and where: what a failed check leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]

BUCKETS = {"0": (0, 1), "1-15": (1, 16), "16-255": (16, 256), "256-": (256, 1 << 31)}  # positions


@dataclass(frozen=True)
class Place:
    """One number."""

    position: int
    token: int
    found: float
    expected: float

    def __str__(self) -> str:
        return f"position {self.position}, token {self.token}: {self.found:.6g}, expected {self.expected:.6g}"


@dataclass(frozen=True)
class Comparison:
    """Of logits (n, vocab_size). `error`: largest difference over the largest expected value, of all and by position;
    infinite where something is not finite.
    """

    error: float
    by_position: dict[str, float]
    worst: Place
    n_unequal: int  # words that differ, of `n`
    n: int
    first_unequal: Place | None
    first_above: int | None  # the lowest position whose error is more than is allowed

    @property
    def text(self) -> str:
        """In one line."""
        parts = ", ".join(f"{name}: {error:.2e}" for name, error in self.by_position.items())
        return f"error {self.error:.2e} ({parts}), worst at {self.worst}"

    @property
    def bits(self) -> str:
        """In one line, of what should be the same bits."""
        first = f", first at {self.first_unequal}" if self.first_unequal else ""
        return f"{self.n_unequal} of {self.n} words differ{first}"

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    found: F32Array, expected: F32Array, positions: Sequence[int] | NDArray[Any], allowed: float = 0.0
) -> Comparison:
    """Row i is of `positions[i]`."""
    at = np.asarray(positions)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(found.astype(np.float64) - expected)
    difference[~np.isfinite(difference)] = np.inf
    relative = difference / np.abs(expected).max()
    of_row = relative.max(axis=1)
    buckets = {name: of_row[(at >= begin) & (at < end)] for name, (begin, end) in BUCKETS.items()}
    unequal = np.argwhere(found.view(np.uint32) != expected.view(np.uint32))
    above = at[of_row > allowed]

    def place(row: int, token: int) -> Place:
        return Place(int(at[row]), int(token), float(found[row, token]), float(expected[row, token]))

    return Comparison(
        error=float(of_row.max()),
        by_position={name: float(errors.max()) for name, errors in buckets.items() if len(errors)},
        worst=place(*np.unravel_index(relative.argmax(), relative.shape)),
        n_unequal=len(unequal),
        n=found.size,
        first_unequal=place(*unequal[0]) if len(unequal) else None,
        first_above=int(above.min()) if len(above) else None,
    )
