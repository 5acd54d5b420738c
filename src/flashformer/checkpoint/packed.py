"""One file of packed weights, as far as it can be told without knowing the model: its header.

    [ MAGIC | length u64 | JSON, padded with spaces to whole pages | weights region, in whole pages
      | sum of the 8-byte words of every block, u64 | SHA-256 of header and sums ]

backends/packed.py writes such files and proves the rest of one. In a model folder it takes the place of safetensors;
its JSON then is {"formats", "tied", "layout", "original", "error"}, and what it says of the layout is only compared
with the layout that config and formats imply: no offset comes from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LoadError
from ..formats import FORMATS, QUANTS, Format
from .convert import INDEX, SINGLE
from .files import member, parse_json, refuse_impostor, shown
from .tensor import StoredFile

PACKED = "weights.ffpack"
MAGIC = b"FFPACK1\n"
PAGE = 4096
MAX_HEADER_BYTES = 100_000_000
AGAIN = "quantize the original again"

_PREFIX = len(MAGIC) + 8
_FIELDS = {"formats", "tied", "layout", "original", "error"}


@dataclass(frozen=True)
class PackedFormats:
    """Of what is not quantized, and of the matrices of layers and head where they are."""

    weights: Format
    body_quant: Format | None
    head_quant: Format | None

    def to_json(self) -> dict[str, str]:
        quants = {"body": self.body_quant, "head": self.head_quant}
        return {"weights": self.weights.name, **{k: quant.name if quant else "none" for k, quant in quants.items()}}


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """`header` is the beginning of `file` in whole pages, `layout` what it says of the rest."""

    file: StoredFile
    header: bytes
    formats: PackedFormats
    tied: bool
    layout: Mapping[str, Any]
    original: str  # the model that was packed
    error: Mapping[str, Any]  # what that cost


def encode_header(document: Mapping[str, Any]) -> bytes:
    """The first pages of a file."""
    text = json.dumps(document, separators=(",", ":")).encode()
    size = -(-(_PREFIX + len(text)) // PAGE) * PAGE
    return (MAGIC + len(text).to_bytes(8, "little") + text).ljust(size)


def find_packed(folder: Path) -> PackedWeights | None:
    """The packed weights of a model folder, their header checked; None where there are none. Raises LoadError."""
    path = member(folder, PACKED)
    if path is None:
        return None
    others = [name for name in (SINGLE, INDEX) if member(folder, name) is not None]
    if others:
        raise LoadError(f"{folder}: holds both {PACKED} and {others[0]}: keep the one to be used, move the other away")
    return open_packed(path)


def open_packed(path: Path) -> PackedWeights:
    """The header of a model's packed file. Raises LoadError."""
    file = StoredFile(path)
    prefix = np.empty(min(64, file.n_bytes), np.uint8)
    file.read(0, prefix)
    n_text = _header_size(path, prefix.tobytes(), file.n_bytes)
    header = np.empty(-(-(_PREFIX + n_text) // PAGE) * PAGE, np.uint8)
    if len(header) > file.n_bytes:
        raise LoadError(
            f"{path}: truncated: {file.n_bytes} bytes found, {len(header)} expected for its header alone; copy it again"
        )
    file.read(0, header)
    data = header.tobytes()
    document = parse_json(data[_PREFIX : _PREFIX + n_text], f"{path}: header")
    if set(document) != _FIELDS:
        what = "a file of the cache" if "sources" in document else "another file"
        raise LoadError(
            f"{path}: header: found {shown(sorted(document))}, expected {shown(sorted(_FIELDS))}: this is {what}, or "
            f"one of another version; {AGAIN}"
        )
    tied, layout, original, error = (document[name] for name in ("tied", "layout", "original", "error"))
    if (type(tied), type(layout), type(original), type(error)) != (bool, dict, str, dict):
        raise LoadError(f"{path}: header: tied, layout, original or error is of the wrong kind; {AGAIN}")
    return PackedWeights(file, data, _formats(path, document["formats"]), tied, layout, original, error)


def _header_size(path: Path, prefix: bytes, n_file: int) -> int:
    """Bytes of the JSON of a file of `n_file` bytes that begins with `prefix`. Raises LoadError."""
    refuse_impostor(path, prefix)
    if not prefix.startswith(MAGIC):
        foreign = prefix.startswith(MAGIC[:6])
        what = "written by another version of flashformer" if foreign else "not a file of packed weights"
        raise LoadError(f"{path}: {what}: begins with {prefix[:8]!r}, expected {MAGIC!r}; {AGAIN}")
    n_text = int.from_bytes(prefix[len(MAGIC) : _PREFIX].ljust(8, b"\xff"), "little")
    if n_text > MAX_HEADER_BYTES:
        raise LoadError(
            f"{path}: says its header has {n_text} bytes, at most {MAX_HEADER_BYTES} are accepted; the file is "
            f"damaged, copy it again, or {AGAIN}"
        )
    return n_text


def _formats(path: Path, value: object) -> PackedFormats:
    tables: dict[str, Mapping[str, Format | None]] = {
        "weights": FORMATS,
        "body": {"none": None, **QUANTS},
        "head": {"none": None, **QUANTS},
    }
    if not isinstance(value, dict) or set(value) != set(tables):
        raise LoadError(f"{path}: header: formats: found {shown(value)}, expected {', '.join(tables)}; {AGAIN}")
    for name, table in tables.items():
        if not isinstance(value[name], str) or value[name] not in table:
            raise LoadError(
                f"{path}: header: {name} = {shown(value[name])} is no format of this version; expected one of "
                f"{', '.join(table)}"
            )
    quants = tables["body"]
    return PackedFormats(FORMATS[value["weights"]], quants[value["body"]], quants[value["head"]])
