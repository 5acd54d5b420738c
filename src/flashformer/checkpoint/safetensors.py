"""One safetensors file: header checked entry by entry; tensors stay in the file until they are asked for.

    [ u64 little-endian: header bytes n | n bytes of JSON | data ]

The header maps names to {"dtype", "shape", "data_offsets": [begin, end)} counted from the start of the data.
The tensors must tile the data exactly: no gap, no overlap, nothing after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import LoadError
from ..formats import BY_SAFETENSORS, Format
from .files import parse_json, refuse_impostor, shown
from .tensor import Stored, StoredFile, Tensor

MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8


@dataclass(frozen=True)
class Entry:
    """A checked header entry; `begin` and `end` are bytes from the start of the data."""

    name: str
    format: Format
    shape: tuple[int, ...]
    begin: int
    end: int


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, not yet read, in file order. Raises LoadError for any file that is not exact."""
    file = StoredFile(path)
    prefix = np.empty(min(64, file.n_bytes), np.uint8)
    file.read(0, prefix)
    n_header = header_size(path, prefix.tobytes(), file.n_bytes)
    header = np.empty(n_header, np.uint8)
    file.read(8, header)
    base = 8 + n_header
    entries = parse_header(path, header.tobytes(), file.n_bytes - base)
    if not entries:
        raise LoadError(f"{path}: holds no tensors; download the model again")
    return {e.name: Tensor(e.name, e.format, Stored(file, base + e.begin, e.shape)) for e in entries}


def header_size(path: Path, prefix: bytes, n_file: int) -> int:
    """Bytes of the header of a file of `n_file` bytes that begins with `prefix`. Raises LoadError."""
    refuse_impostor(path, prefix)
    if len(prefix) < 8:
        raise LoadError(
            f"{path}: {n_file} bytes, but a safetensors file has at least 8; the download was cut off, repeat it"
        )
    n_header = int.from_bytes(prefix[:8], "little")
    if n_header > MAX_HEADER_BYTES:
        raise LoadError(
            f"{path}: says its header has {n_header} bytes, at most {MAX_HEADER_BYTES} are accepted; "
            "this is not a safetensors file"
        )
    if 8 + n_header > n_file:
        raise LoadError(f"{path}: truncated: {n_file} bytes found, at least {8 + n_header} expected; download it again")
    return n_header


def parse_header(path: Path, header: bytes, n_data: int) -> list[Entry]:
    """Header text -> entries in data order, proved to tile `n_data` bytes exactly. Raises LoadError."""
    where = f"{path}: header"
    if not header.startswith(b"{"):
        raise LoadError(f"{where}: expected a JSON object, found {shown(header[:16])}; this is not a safetensors file")
    fields = parse_json(header, where)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise LoadError(f"{where}: __metadata__ must map strings to strings; the file is damaged")
    entries = sorted((_entry(where, name, value) for name, value in fields.items()), key=lambda e: e.begin)
    position = 0
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise LoadError(
                f"{where}: tensor {shown(entry.name)} {kind}: begins at byte {entry.begin}, expected {position}; "
                "the file is damaged, download it again"
            )
        position = entry.end
    if position > n_data:
        raise LoadError(f"{path}: truncated: {n_data} bytes of data found, {position} expected; download it again")
    if position < n_data:
        raise LoadError(
            f"{path}: {n_data - position} bytes after the last tensor: {n_data} bytes of data found, {position} "
            "expected; the file is damaged, download it again"
        )
    return entries


def _entry(where: str, name: str, value: object) -> Entry:
    where = f"{where}: tensor {shown(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise LoadError(f"{where}: expected exactly dtype, shape and data_offsets, found {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        raise LoadError(f"{where}: dtype {shown(dtype)} is not supported; supported: {', '.join(BY_SAFETENSORS)}")
    fmt = BY_SAFETENSORS[dtype]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(d) is int and d > 0 for d in shape):
        raise LoadError(f"{where}: shape {shown(shape)}: expected at most {MAX_DIMS} positive integers")
    n_bytes = fmt.element_bytes
    for d in shape:
        n_bytes *= d
        if n_bytes >= 2**63:
            raise LoadError(f"{where}: shape {shown(shape)} of {dtype} has more than 2^63 bytes; the file is damaged")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(o) is int and 0 <= o < 2**63 for o in offsets)
    ):
        raise LoadError(f"{where}: data_offsets {shown(offsets)}: expected [begin, end], each from 0 to 2^63 - 1")
    begin, end = offsets
    if end - begin != n_bytes:
        raise LoadError(
            f"{where}: data_offsets {shown(offsets)} span {end - begin} bytes, but shape {shape} of {dtype} "
            f"needs {n_bytes}; the file is damaged, download it again"
        )
    return Entry(name, fmt, tuple(shape), begin, end)
