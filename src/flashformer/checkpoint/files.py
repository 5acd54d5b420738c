"""Reading small files of a model folder without trusting them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LoadError

MAX_JSON_BYTES = 100_000_000
MAX_JSON_DEPTH = 64

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_IMPOSTORS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!doctype html", "an HTML page, probably an error page saved in place of the file; download it again"),
    (b"<html", "an HTML page, probably an error page saved in place of the file; download it again"),
    (b"<?xml", "an XML page, probably an error page saved in place of the file; download it again"),
)


def shown(value: object) -> str:
    """repr, short enough for a message whatever a file put there."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def refuse_impostor(path: Path, beginning: bytes) -> None:
    """Raises LoadError if the first bytes are those of a Git LFS pointer or a web page."""
    head = beginning.lstrip().lower()
    for signature, meaning in _IMPOSTORS:
        if head.startswith(signature):
            raise LoadError(f"{path}: this is {meaning}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts `path` in front of the LoadErrors of what does not know where its input came from."""
    try:
        yield
    except LoadError as e:
        raise LoadError(f"{path}: {e}") from e


def member(folder: Path, name: str) -> Path | None:
    """The regular file `name` of a model folder, or None where there is none.

    A link may lead out of the folder only into the blobs of the Hugging Face cache that the folder belongs to.
    Raises LoadError for any other link and for what is not a regular file.
    """
    path = folder / name
    try:
        if not path.is_symlink() and not path.exists():
            return None
        root, real = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError as e:
        raise LoadError(f"{path}: the link leads nowhere; download the model again") from e
    except (OSError, RuntimeError, ValueError) as e:
        raise LoadError(f"{path}: cannot be read: {e}; check its permissions") from e
    if not any(real.is_relative_to(allowed) for allowed in (root, *_cache_blobs(root))):
        raise LoadError(f"{path}: links to {real}, outside the model folder; copy the file into the folder")
    if not real.is_file():
        raise LoadError(f"{path}: expected a regular file")
    return path


def in_hub_cache(folder: Path) -> bool:
    """Whether the folder is a snapshot in the Hugging Face cache."""
    return bool(_cache_blobs(folder.resolve()))


def _cache_blobs(snapshot: Path) -> tuple[Path, ...]:
    """Blob folders of CACHE/models--OWNER--NAME/snapshots/COMMIT: the repository's own and the shared one."""
    repo = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repo.name.startswith("models--"):
        return ()
    return (repo / "blobs", repo.parent / "blobs")


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The file's content. Raises LoadError if it cannot be read or is larger than `limit` bytes."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # asked for first: `read` allocates all that it is allowed
            data = file.read(min(size, limit) + 1)
    except OSError as e:
        raise LoadError(f"{path}: cannot be read: {e.strerror}") from e
    if len(data) > limit:
        raise LoadError(f"{path}: larger than {limit} bytes, far more than such a file needs; download it again")
    return data


def read_text(path: Path) -> str:
    """The file as UTF-8 text. Raises LoadError."""
    data = read_bytes(path)
    refuse_impostor(path, data)
    return _decoded(data, str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that is the file. Raises LoadError."""
    data = read_bytes(path)
    refuse_impostor(path, data)
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """JSON object in UTF-8, without duplicate keys, NaN or nesting deeper than MAX_JSON_DEPTH. Raises LoadError."""
    text = _decoded(data, where)
    depth = _nesting(data)
    if depth > MAX_JSON_DEPTH:
        raise LoadError(f"{where}: JSON nested {depth} deep, at most {MAX_JSON_DEPTH} is accepted; the file is damaged")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise LoadError(f"{where}: not valid JSON: {e}; download the file again") from e
    if not isinstance(value, dict):
        raise LoadError(f"{where}: expected a JSON object, found {type(value).__name__}; download the file again")
    return value


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise LoadError(f"{where}: not UTF-8 at byte {e.start}; the file is damaged, download it again") from e


def _nesting(data: bytes) -> int:
    """Depth of brackets outside strings, found without recursion, before the recursive parser sees the text."""
    brackets = np.frombuffer(_STRING.sub(b"", data).translate(None, _NOT_BRACKETS), np.uint8)
    if not len(brackets):
        return 0
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), np.int8(1), np.int8(-1))
    return int(np.cumsum(steps, dtype=np.int32).max())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {shown(key)} appears twice")
        result[key] = value
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
