"""A named array, in memory or still in its file. Files are read when asked for, never mapped.

Where a mapped file is truncated, touching the lost pages ends the process with SIGBUS. A read comes back short instead,
which is an error that can name the file.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LoadError
from ..formats import Format

SAMPLES, SAMPLE_BYTES = 64, 4096


class StoredFile:
    """A file held open: replacing it under its name changes nothing, writing to it or truncating it is an error.

    Raises LoadError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise LoadError(f"{path}: cannot be opened: {e.strerror}; check its permissions") from e
        weakref.finalize(self, os.close, self.fd)
        self._opened = self._state()

    @property
    def n_bytes(self) -> int:
        """When it was opened."""
        return self._opened[0]

    @cached_property
    def identity(self) -> tuple[str, int, int, str]:
        """What tells this content from another: path without links, bytes, time of the last write in ns, and a digest
        of SAMPLES pieces of it, as there are ways to write files that leave the first three alone. Raises LoadError.
        """
        digest = hashlib.sha256()
        for i in range(SAMPLES):
            offset = i * max(0, self.n_bytes - SAMPLE_BYTES) // (SAMPLES - 1)
            piece = np.empty(min(SAMPLE_BYTES, self.n_bytes), np.uint8)
            self.read(offset, piece)
            digest.update(piece.data)
        return (os.path.realpath(self.path), *self._opened, digest.hexdigest())

    def read(self, offset: int, out: NDArray[Any]) -> None:
        """Fills the contiguous array `out` with the bytes from `offset`. Raises LoadError naming the file."""
        target, done = out.reshape(-1).view(np.uint8).data, 0
        try:
            while done < len(target) and (n := os.preadv(self.fd, [target[done:]], offset + done)):
                done += n
        except OSError as e:
            raise LoadError(
                f"{self.path}: bytes {offset + done} to {offset + len(target)} cannot be read: {e.strerror}; "
                "check the disk, or download the file again"
            ) from e
        self.require_unchanged()
        if done < len(target):
            raise LoadError(f"{self.path}: ends {len(target) - done} bytes early; download the file again")

    def require_unchanged(self) -> None:
        """Raises LoadError if the file was written to since it was opened."""
        found = self._state()
        if found != self._opened:
            raise LoadError(
                f"{self.path}: changed while it was read: {self._opened[0]} bytes when it was opened, {found[0]} now; "
                "load the model again when nothing writes to it"
            )

    def _state(self) -> tuple[int, int]:
        """Bytes, and the time of the last write in ns."""
        stat = os.fstat(self.fd)
        return stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `offset` bytes into `file`, rows one after the other."""

    file: StoredFile
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A named array. Its raw bits are in `format.storage`, with the logical shape."""

    name: str
    format: Format
    source: NDArray[Any] | Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.format.element_bytes

    @property
    def data(self) -> NDArray[Any]:
        """All of it, read-only. Of a stored tensor each access reads the file. Raises LoadError."""
        if isinstance(self.source, Stored):
            return self._read(self.source, self.shape, 0)
        return self.source

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """data[begin:end] of a tensor with 1 or more dimensions, without reading the rest. Raises LoadError."""
        if not isinstance(self.source, Stored):
            return self.source[begin:end]
        begin, end, _ = slice(begin, end).indices(self.shape[0])
        return self._read(self.source, (max(0, end - begin), *self.shape[1:]), begin * prod(self.shape[1:]))

    def _read(self, stored: Stored, shape: tuple[int, ...], first_element: int) -> NDArray[Any]:
        data = np.empty(shape, self.format.storage)
        stored.file.read(stored.offset + first_element * self.format.element_bytes, data)
        data.flags.writeable = False
        return data
