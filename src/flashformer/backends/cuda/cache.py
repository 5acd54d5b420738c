"""Cubins that were compiled before, as files: SHA-256 of the cubin, then the cubin.

A file's name is a digest of everything that decides its content: sources, options, the version of NVRTC. One that is
damaged or that others could have written is compiled anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ...log import log
from .. import kept
from .nvrtc import Source, compile_cubin, version

SUFFIX = ".cubin"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cubin_of(source: Source) -> bytes:
    """From its file, or compiled now and then kept. Raises DeviceError as `compile_cubin` does."""
    folder = kept.own_folder("cubin", "compiled kernels are")
    if folder is None:
        return compile_cubin(source)[0]
    path = folder / f"{key(source)}{SUFFIX}"
    if (cubin := _read(path)) is not None:
        return cubin
    cubin, _ = compile_cubin(source)
    try:
        kept.remove_unused(folder, SUFFIX)
        kept.write_whole(path, (hashlib.sha256(cubin).digest(), cubin))
    except OSError as error:
        log.warning("%s: compiled kernels are not kept: %s", path, error.strerror)
    return cubin


def key(source: Source) -> str:
    """Hexadecimal digest."""
    document = [source.root, source.headers, source.options, version()]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    """The cubin; None, with a warning unless there is no file, where it cannot be trusted."""
    try:
        fd = kept.open_own(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: cannot be opened (%s); compiling again", path, error.strerror)
        return None
    try:
        with open(fd, "rb") as file:
            kept.require_own(os.fstat(fd), "the file")
            data = file.read()
        digest, cubin = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if not cubin or hashlib.sha256(cubin).digest() != digest:
            raise ValueError("damaged")
    except (OSError, ValueError) as error:
        log.warning("%s: %s; compiling again", path, error)
        return None
    kept.mark_used(path)
    return cubin
