"""Packed files of models taken apart, and put together again with a header of one's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE, DIGEST, BLOCK = 4096, 32, 1 << 20


def _parts(path: Path) -> tuple[dict[str, Any], bytes, bytes]:
    """Header, region and sums."""
    data = path.read_bytes()
    n_text = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + n_text])
    begin = -(-(16 + n_text) // PAGE) * PAGE
    n_region = -(-header["layout"]["weights_bytes"] // PAGE) * PAGE
    end = begin + n_region
    assert len(data) == end + 8 * -(-n_region // BLOCK) + DIGEST
    return header, data[begin:end], data[end:-DIGEST]


def header_of(path: Path) -> dict[str, Any]:
    return _parts(path)[0]


def region_of(path: Path) -> bytes:
    return _parts(path)[1]


def forged(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header in place, with a digest that is right again."""
    header, region, sums = _parts(path)
    change(header)
    text = json.dumps(header).encode()
    size = -(-(16 + len(text)) // PAGE) * PAGE
    first = (b"FFPACK1\n" + len(text).to_bytes(8, "little") + text).ljust(size)
    path.write_bytes(first + region + sums + hashlib.sha256(first + sums).digest())
