"""Packed weights as files, so that a model is packed once and mapped from then on.

    [ header: MAGIC | length u64 | JSON, padded with spaces to whole pages | weights region, in whole pages
      | sum of the 8-byte words of every block, u64 | SHA-256 of header and sums ]

The JSON is the *key*: everything that decides the bytes, that is the layout of the Program and the identity of every
source tensor (file, size, time of the last write, place). A file whose key is not equal, whose size or digest is wrong
or whose blocks do not add up is packed anew. Files appear whole or not at all (written aside, then renamed) and are
never written to again; folder and files belong to this user alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import env
from ..checkpoint.tensor import Stored, Tensor
from ..formats import NF4
from ..log import log
from ..program.ir import Program
from ..program.pack import PACK_VERSION
from ..quantize import INT4_STEPS, INT4_ZP_SHARES, NF4_SHARES

MAGIC = b"FFPACK1\n"
PAGE = 4096
BLOCK_BYTES = 1 << 20
MIN_BYTES = 64 << 20  # smaller weights are packed faster than a file is found
MAX_IN_MEMORY = 1 << 20  # of a source tensor that is no part of a file, to be told by its content
LOCK_S = 120.0  # another process may take so long to write the same file
UNUSED_S = 30 * 24 * 3600.0  # a file that nobody used for so long goes when the next is written
SUFFIX = ".ffpack"

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


@dataclass(frozen=True)
class PackedFile:
    """Where the packed weights of one Program and one checkpoint lie, or will."""

    path: Path
    header: bytes  # whole pages
    n_bytes: int  # of the weights region, whole pages

    @property
    def n_blocks(self) -> int:
        return -(-self.n_bytes // BLOCK_BYTES)

    def map(self, native: Any, n_threads: int) -> Any | None:
        """The weights region as a mapping of the file; None if there is none, or none that can be trusted."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as e:
            log.warning("%s: cannot be opened (%s); packing again", self.path, e.strerror)
            return None
        try:
            return self._checked(native, fd, n_threads)
        except (OSError, RuntimeError, ValueError) as e:
            log.warning("%s: %s; packing again", self.path, e)
            return None
        finally:
            os.close(fd)

    def _checked(self, native: Any, fd: int, n_threads: int) -> Any:
        """Raises ValueError that says what is wrong."""
        stat = os.fstat(fd)
        _require_own(stat, "the file")
        n_sums, digest = 8 * self.n_blocks, hashlib.sha256().digest_size
        expected = len(self.header) + self.n_bytes + n_sums + digest
        if stat.st_size != expected:
            raise ValueError(f"{stat.st_size} bytes instead of {expected}")
        header = os.pread(fd, len(self.header), 0)
        tail = os.pread(fd, n_sums + digest, len(self.header) + self.n_bytes)
        if header != self.header or hashlib.sha256(header + tail[:n_sums]).digest() != tail[n_sums:]:
            raise ValueError("the header is damaged, or describes other weights")
        region = native.Region.map(fd, len(self.header), self.n_bytes)
        wrong = np.flatnonzero(block_sums(native, region, n_threads) != np.frombuffer(tail[:n_sums], "<u8"))
        if len(wrong):
            raise ValueError(f"{len(wrong)} of {self.n_blocks} blocks are damaged, the first is number {wrong[0]}")
        with suppress(OSError):
            os.utime(self.path)  # in use
        return region

    def write(self, native: Any, region: Any, n_threads: int) -> None:
        """Leaves the file as it was, and says why, where it cannot be written."""
        folder, total = self.path.parent, len(self.header) + self.n_bytes
        aside = folder / f"{self.path.stem}.{secrets.token_hex(8)}.tmp"
        try:
            _remove_unused(folder)
            free = shutil.disk_usage(folder).free
            if free < total + (1 << 30):
                log.warning("%s: packed weights need %d bytes, %d are free; not kept", folder, total, free)
                return
            self.path.with_suffix(".lock").touch()
            sums = block_sums(native, region, n_threads).astype("<u8").tobytes()
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(self.header)
                file.write(region.array)
                file.write(sums + hashlib.sha256(self.header + sums).digest())
            os.replace(aside, self.path)
        except OSError as e:
            log.warning("%s: %s after some of %d bytes; packed weights are not kept", aside, e.strerror, total)
        finally:
            aside.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process may write the file; others wait for it, but not for ever."""
        try:
            fd = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            log.warning("%s: packed weights are not kept: %s", self.path.parent, e.strerror)
            yield False
            return
        try:
            yield _locked(fd)
        finally:
            os.close(fd)  # and with it the lock, also where the process dies


def packed_file(program: Program, weights: Mapping[str, Tensor]) -> PackedFile | None:
    """The file for these weights; None where none is wanted or the cache folder cannot be used."""
    n_bytes = program.memory.weights_bytes
    if n_bytes < MIN_BYTES or (folder := env.cache_folder()) is None:
        return None
    document = key(program, weights)
    if document is None:
        return None
    try:
        folder = folder / "packed"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder.stat(), "the folder")
    except (OSError, ValueError) as e:
        log.warning("%s: packed weights are not kept: %s", folder, e)
        return None
    text = json.dumps(document, separators=(",", ":")).encode()
    size = -(-(len(MAGIC) + 8 + len(text)) // PAGE) * PAGE
    header = (MAGIC + len(text).to_bytes(8, "little") + text).ljust(size)
    name = hashlib.sha256(header).hexdigest()[:32] + SUFFIX
    return PackedFile(folder / name, header, -(-n_bytes // PAGE) * PAGE)


def key(program: Program, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """All that decides the bytes of the weights region. None for weights that cannot be told by it."""
    matrices, vectors, roles = [], {}, {"embed"}
    for phase in program.phases:
        if (m := phase.matrix) is not None:
            matrices.append([*m.roles, m.n_out, m.k, m.format.name, m.vectors, m.n_tiles, m.offset, m.order.value, m.layout.value])
            roles.update(m.roles)
        for name, vector in phase.vectors.items():
            vectors[vector.offset] = [*vector.roles, vector.length, name == "bias"]
            roles.update(vector.roles)
    sources = {role: _identity(weights[role]) for role in sorted(roles)}
    if None in sources.values():
        return None
    return {
        "version": PACK_VERSION,
        "quantizer": [float(x) for table in (INT4_STEPS, INT4_ZP_SHARES, NF4_SHARES, NF4) for x in table],
        "weights_bytes": program.memory.weights_bytes,
        "embed_format": program.target.weight_format.name,
        "embed_offset": program.embed_offset,
        "matrices": matrices,
        "vectors": vectors,
        "sources": sources,
    }


def _identity(tensor: Tensor) -> list[Any] | None:
    source = tensor.source
    if isinstance(source, Stored):
        return [tensor.format.name, *tensor.shape, source.offset, *source.file.identity]
    if source.nbytes > MAX_IN_MEMORY:
        return None
    return [tensor.format.name, *tensor.shape, hashlib.sha256(np.ascontiguousarray(source).tobytes()).hexdigest()]


def load_or_pack(
    native: Any, program: Program, weights: Mapping[str, Tensor], n_threads: int, pack: Callable[[Any], None]
) -> Any:
    """The weights region, from its file or packed now (and then kept); `pack` fills a region.

    Raises LoadError where packing does, MemoryError.
    """

    def packed() -> Any:
        n_bytes = -(-program.memory.weights_bytes // PAGE) * PAGE
        region = native.Region(n_bytes, resident=False)  # packing writes all of it
        pack(region)
        return region

    file = packed_file(program, weights)
    if file is None:
        return packed()
    if (region := file.map(native, n_threads)) is not None:
        return region
    with file.lock() as mine:
        if (region := file.map(native, n_threads)) is None:  # another process may have written it meanwhile
            region = packed()
            if mine:
                file.write(native, region, n_threads)
    return region


def block_sums(native: Any, region: Any, n_threads: int) -> np.ndarray[Any, Any]:
    """(n_blocks) uint64: the sum of the 8-byte words of every block of a region in whole pages."""
    sums = np.zeros(-(-len(region.array) // BLOCK_BYTES), np.uint64)
    native.block_sums(region.array, BLOCK_BYTES, sums, n_threads)
    return sums


def _locked(fd: int) -> bool:
    end = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)


def _require_own(stat: os.stat_result, what: str) -> None:
    """Raises ValueError if others could have written it."""
    if stat.st_uid != os.geteuid():
        raise ValueError(f"{what} belongs to another user ({stat.st_uid})")
    if stat.st_mode & 0o022:
        raise ValueError(f"others may write to {what} (mode {stat.st_mode & 0o777:o})")


def _remove_unused(folder: Path) -> None:
    """Removes what was last used long before the latest use of anything here."""
    used: dict[Path, float] = {}
    for path in folder.iterdir():
        with suppress(OSError):
            used[path] = path.stat().st_mtime
    for path, last in used.items():
        limit = UNUSED_S if path.suffix == SUFFIX else 24 * 3600.0
        if max(used.values()) - last > limit:
            with suppress(OSError):
                path.unlink()
