"""Hand-offs: how many arrivals a worker waits for before each phase."""

from __future__ import annotations


def full_barriers(n_phases: int, n_workers: int) -> tuple[tuple[int, ...], ...]:
    """waits[phase][worker]: everybody has finished every earlier phase."""
    return tuple((phase * n_workers,) * n_workers for phase in range(n_phases))
