"""The read-bandwidth probe: how fast this machine's threads can read memory, now."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import UnavailableError
from . import topology
from .native import load_native

# Ways to read, of which another is the fastest on another CPU: streams of a thread, and bytes that a line is asked for
# early, into the second level of caches and into the first; 0: not at all.
READINGS = ((1, 0, 0), (1, 0, 4096), (1, 4096, 2048), (2, 3072, 1536))


def probe_bytes() -> int:
    """Size of a region that no cache helps with: 8 last-level caches or 1 GiB, whichever is more."""
    return max(8 * topology.last_level_cache_bytes(), 1 << 30)


def read_gb_s(memory: NDArray[np.uint8], n_threads: int, seconds: float) -> float:
    """The fastest of all ways to read, an equal part of the time each; 1e9 bytes per second."""
    probe = load_native().probe
    return max(float(probe(memory, n_threads, *how, seconds / len(READINGS))) for how in READINGS)


class ReadProbe:
    """A region in the same kind of pages as packed weights, every page written, read by `n_threads`."""

    def __init__(self, n_threads: int, n_bytes: int | None = None) -> None:
        """Raises DeviceError where the extension is missing or memory does not suffice."""
        size, free = n_bytes or probe_bytes(), topology.free_memory()
        if free is not None and size > free.value:
            raise UnavailableError(
                f"the bandwidth probe needs {size:,} bytes, {int(free.value):,} are free ({free.source})"
            )
        self._n_threads = n_threads
        self._region = load_native().Region(size)
        self._region.array[:] = 1

    def gb_s(self, seconds: float) -> float:
        """As `read_gb_s`."""
        return read_gb_s(self._region.array, self._n_threads, seconds)
