"""Host memory for packed weights: what packed.py takes from the CPU extension, in NumPy where that is missing."""

from __future__ import annotations

import errno
import os
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DeviceError


class Region:
    """Memory, or a copy of a part of a file; `array` (n_bytes) is all of it."""

    def __init__(self, n_bytes: int, resident: bool = True) -> None:
        """Raises MemoryError. `resident` is a wish of others; pages come when they are written to."""
        self.array: NDArray[np.uint8] = np.empty(n_bytes, np.uint8)

    @classmethod
    def read(cls, fd: int, offset: int, n_bytes: int, n_threads: int) -> Region:
        """Raises MemoryError, OSError. One thread reads, whatever `n_threads`."""
        region, n_read = cls(n_bytes), 0
        while n_read < n_bytes:
            n = os.preadv(fd, [region.array[n_read:].data], offset + n_read)
            if n == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            n_read += n
        return region


def block_sums(buffer: NDArray[np.uint8], block_bytes: int, sums: NDArray[np.uint64], n_threads: int) -> None:
    """Sums of the 8-byte words of each block, into `sums`."""
    whole = len(buffer) // block_bytes
    blocks = buffer[: whole * block_bytes].view(np.uint64).reshape(whole, block_bytes // 8)
    cuts = [whole * i // n_threads for i in range(n_threads + 1)]

    def add(begin: int, end: int) -> None:
        np.add.reduce(blocks[begin:end], axis=1, out=sums[begin:end])

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(add, cuts[:-1], cuts[1:]))
    if whole < len(sums):
        sums[whole] = np.add.reduce(buffer[whole * block_bytes :].view(np.uint64))


def extension() -> Any | None:
    """The CPU extension where it is installed: it quantizes faster than NumPy."""
    from ..cpu.native import load_native

    try:
        return load_native()
    except DeviceError:
        return None


def host_memory() -> Any:
    """What packed.py is to use: the extension, or this module."""
    return extension() or types.SimpleNamespace(Region=Region, block_sums=block_sums)
