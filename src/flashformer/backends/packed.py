"""Packed weights as files: a model is packed once and read from then on.

checkpoint/packed.py draws such a file. Files of the cache are ours: their JSON is the *key*, all that decides the
bytes, that is the layout of the Program and the identity of every source tensor (file, size, time of the last write,
digest of samples, place). One whose key is not equal, whose size or digest is wrong or whose blocks do not add up is
packed anew. They appear whole or not at all (written aside, then renamed) and are never written to again; folder and
files belong to this user alone.

A file that is a model's weights (`flashformer quantize`) was given to us: it must be whole and have the layout of the
Program that is built from the model's configuration and the file's formats, else it is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.files import shown
from ..checkpoint.packed import AGAIN, PAGE, PackedFormats, PackedWeights, encode_header
from ..checkpoint.tensor import Stored, Tensor
from ..errors import LoadError
from ..formats import NF4
from ..log import log
from ..program.ir import Program
from ..program.pack import PACK_VERSION
from ..quantize import INT4_STEPS, INT4_ZP_SHARES, NF4_SHARES
from . import kept

BLOCK_BYTES = 1 << 20
MIN_BYTES = 64 << 20  # smaller weights are packed faster than a file is found
MAX_IN_MEMORY = 1 << 20  # of a source tensor that is no part of a file, to be told by its content
LOCK_S = 120.0  # another process may take so long to write the same file
SUFFIX = ".ffpack"

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


@dataclass(frozen=True)
class PackedFile:
    """Where packed weights lie, or will."""

    path: Path
    header: bytes  # whole pages
    n_bytes: int  # of the weights region, whole pages

    @property
    def n_blocks(self) -> int:
        return -(-self.n_bytes // BLOCK_BYTES)

    def read(self, native: Any, n_threads: int) -> Any | None:
        """The weights region, read from the file; None if there is none, or none that can be trusted."""
        try:
            fd = kept.open_own(self.path)
        except FileNotFoundError:
            return None
        except OSError as e:
            log.warning("%s: cannot be opened (%s); packing again", self.path, e.strerror)
            return None
        try:
            kept.require_own(os.fstat(fd), "the file")
            region = self.checked(native, fd, n_threads)
            kept.mark_used(self.path)
            return region
        except (OSError, RuntimeError, ValueError) as e:
            log.warning("%s: %s; packing again", self.path, e)
            return None
        finally:
            os.close(fd)

    def checked(self, native: Any, fd: int, n_threads: int) -> Any:
        """The weights region of the open file, every block added up. Raises ValueError that says what is wrong."""
        due = self.sums(fd)
        region = native.Region.read(fd, len(self.header), self.n_bytes, n_threads)
        wrong = np.flatnonzero(block_sums(native, region, n_threads) != due)
        if len(wrong):
            raise ValueError(f"{len(wrong)} of {self.n_blocks} blocks are damaged, the first is number {wrong[0]}")
        return region

    def sums(self, fd: int) -> np.ndarray[Any, Any]:
        """(n_blocks) uint64 as the file states them; its size, header and digest are right. Raises ValueError."""
        n_sums, digest = 8 * self.n_blocks, hashlib.sha256().digest_size
        found, expected = os.fstat(fd).st_size, len(self.header) + self.n_bytes + n_sums + digest
        if found != expected:
            raise ValueError(f"{found} bytes instead of {expected}")
        header = os.pread(fd, len(self.header), 0)
        tail = os.pread(fd, n_sums + digest, len(self.header) + self.n_bytes)
        if header != self.header or hashlib.sha256(header + tail[:n_sums]).digest() != tail[n_sums:]:
            raise ValueError("the header or the sums are damaged, or describe other weights")
        return np.frombuffer(tail[:n_sums], "<u8")

    def parts(self, native: Any, region: Any, n_threads: int) -> tuple[Any, ...]:
        """The buffers of the file, one after the other."""
        sums = block_sums(native, region, n_threads).astype("<u8").tobytes()
        return self.header, region.array, sums, hashlib.sha256(self.header + sums).digest()

    def put(self, native: Any, region: Any, n_threads: int) -> None:
        """Writes all of it to `path`, a new file for whoever the user lets read it. Raises OSError."""
        with open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            for part in self.parts(native, region, n_threads):
                file.write(part)

    def write(self, native: Any, region: Any, n_threads: int) -> None:
        """Leaves the file as it was, and says why, where it cannot be written."""
        folder, total = self.path.parent, len(self.header) + self.n_bytes
        try:
            kept.remove_unused(folder, SUFFIX)
            if not kept.make_room(folder, SUFFIX, total):
                share = f"with {kept.FREE_SHARE:.0%} of the disk left free"
                log.warning("%s: packed weights of %d bytes are not kept: no room for them %s", folder, total, share)
                return
            self.path.with_suffix(".lock").touch()
            kept.write_whole(self.path, self.parts(native, region, n_threads))
            log.info("%s: packed weights kept, %d bytes (FLASHFORMER_CACHE=off keeps none)", self.path, total)
        except OSError as e:
            log.warning("%s: %s after some of %d bytes; packed weights are not kept", self.path, e.strerror, total)

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
    if program.memory.weights_bytes < MIN_BYTES or (document := key(program, weights)) is None:
        return None
    if (folder := kept.own_folder("packed", "packed weights are")) is None:
        return None
    header = encode_header(document)
    name = hashlib.sha256(header).hexdigest()[:32] + SUFFIX
    return PackedFile(folder / name, header, _region_bytes(program))


def key(program: Program, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """All that decides the bytes of the weights region. None for weights that cannot be told by it."""
    roles = {"embed"}
    for phase in program.phases:
        roles.update(*([phase.matrix.roles] if phase.matrix else []), *(v.roles for v in phase.vectors.values()))
    sources = {role: _identity(weights[role]) for role in sorted(roles)}
    if None in sources.values():
        return None
    quantizer = [float(x) for table in (INT4_STEPS, INT4_ZP_SHARES, NF4_SHARES) for x in table]
    return {"layout": layout(program), "quantizer": quantizer, "sources": sources}


def layout(program: Program) -> dict[str, Any]:
    """Where everything lies in the weights region, and how."""
    matrices, vectors = [], {}
    for phase in program.phases:
        if (m := phase.matrix) is not None:
            how = (m.format.name, m.layout.value, m.vectors, m.n_tiles)
            matrices.append([*m.roles, m.n_out, m.k, *how, m.offset, m.order.value])
        for name, vector in phase.vectors.items():
            vectors[str(vector.offset)] = [*vector.roles, vector.length, name == "bias"]
    return {
        "version": PACK_VERSION,
        "weights_bytes": program.memory.weights_bytes,
        "embed_format": program.target.weight_format.name,
        "embed_offset": program.embed_offset,
        "codebook": list(NF4),
        "matrices": matrices,
        "vectors": vectors,
    }


def _identity(tensor: Tensor) -> list[Any] | None:
    source = tensor.source
    if isinstance(source, Stored):
        return [tensor.format.name, *tensor.shape, source.offset, *source.file.identity]
    if source.nbytes > MAX_IN_MEMORY:
        return None
    return [tensor.format.name, *tensor.shape, hashlib.sha256(np.ascontiguousarray(source).tobytes()).hexdigest()]


def load_or_pack(
    native: Any,
    program: Program,
    weights: Mapping[str, Tensor],
    n_threads: int,
    pack: Callable[[Any], None],
    *,
    keep: bool = True,
) -> Any:
    """The weights region, from its file or packed now (and then kept, if `keep`); `pack` fills a region.

    Raises LoadError where packing does, MemoryError.
    """

    def packed() -> Any:
        region = native.Region(_region_bytes(program), resident=False)  # packing writes all of it
        pack(region)
        return region

    file = packed_file(program, weights)
    if file is None:
        return packed()
    if (region := file.read(native, n_threads)) is not None:
        return region
    if not keep:
        return packed()
    with file.lock() as mine:
        if (region := file.read(native, n_threads)) is None:  # another process may have written it meanwhile
            region = packed()
            if mine:
                file.write(native, region, n_threads)
    return region


def read_given(native: Any, program: Program, given: PackedWeights, n_threads: int) -> Any:
    """The weights region of a model's packed file. Raises LoadError."""
    with _refusing(given):
        region = _given_file(program, given).checked(native, given.file.fd, n_threads)
    given.file.require_unchanged()
    return region


def require_given(program: Program, given: PackedWeights) -> None:
    """Raises LoadError if a model's packed file is not what the Program needs; of the weights, none is read."""
    with _refusing(given):
        _given_file(program, given).sums(given.file.fd)


def write_given(
    native: Any, program: Program, region: Any, n_threads: int, path: Path, original: str, error: Mapping[str, Any]
) -> None:
    """Writes a model's packed file, with the name of the model that was packed and what that cost. Raises OSError."""
    target = program.target
    formats = PackedFormats(target.weight_format, target.body_quant, target.head_quant)
    document = {
        "formats": formats.to_json(),
        "tied": program.spec.tied,
        "layout": layout(program),
        "original": original,
        "error": dict(error),
    }
    PackedFile(path, encode_header(document), len(region.array)).put(native, region, n_threads)


def given_bytes(program: Program) -> int:
    """About as many bytes as `write_given` needs, never less."""
    n_bytes = _region_bytes(program)
    return n_bytes + n_bytes // BLOCK_BYTES * 8 + len(encode_header(layout(program))) + 2 * PAGE


def _given_file(program: Program, given: PackedWeights) -> PackedFile:
    """Raises ValueError if the file's layout is not the Program's."""
    expected = json.loads(json.dumps(layout(program)))
    if given.layout != expected:
        wrong = next(k for k in (*expected, *given.layout) if given.layout.get(k) != expected.get(k))
        raise ValueError(
            f"{wrong} of its layout: found {shown(given.layout.get(wrong))}, but config.json and this version of "
            f"flashformer expect {shown(expected.get(wrong))}"
        )
    return PackedFile(given.file.path, given.header, _region_bytes(program))


@contextmanager
def _refusing(given: PackedWeights) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as e:
        raise LoadError(f"{given.file.path}: {e}; copy it again, or {AGAIN} ({shown(given.original)})") from e


def _region_bytes(program: Program) -> int:
    return -(-program.memory.weights_bytes // PAGE) * PAGE


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
