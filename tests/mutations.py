"""Seeded mutations of bytes, of JSON by its structure, and of weight files by their parts."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

INTERESTING_BYTES = (
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\xed\xa0\x80",
    b"\\u0000",
    b"NaN",
)
INTERESTING_NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**40),
    *(0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, -1e9, float("inf"), float("nan")),
)
INTERESTING_VALUES: tuple[Any, ...] = (
    *INTERESTING_NUMBERS,
    *(None, True, False, "", "a", "F32", "BF16", "silu", "llama3", "default", "full_attention", "../x", "x" * 3000),
    *([], {}, [[]], [0], [0, 0], [2**63], {"": {}}, {"a": None}),
)


def mutate_bytes(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """1 to 4 edits: flips, cuts, repeats, splices with another seed, special bytes, numbers."""
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randint(0, len(data)), rng.choice((1, 1, 2, 4, 8, 64))
        before, there, after = data[:at], data[at : at + n], data[at + n :]
        new: tuple[bytes, ...] = (
            before + rng.randbytes(len(there)) + after,
            before + rng.choice(INTERESTING_BYTES) + there + after,
            before + str(rng.choice(INTERESTING_NUMBERS)).encode() + after,
            before + there * rng.choice((2, 3, 1000)) + after,
            before + _tail(rng, rng.choice(others)),
            before + after,
            before,
        )
        data = rng.choice(new)
    return data


def _tail(rng: random.Random, data: bytes) -> bytes:
    return data[rng.randint(0, len(data)) :]


def mutate_json(rng: random.Random, value: Any, others: list[Any]) -> bytes:
    """1 to 3 edits of nodes: replaced, removed, moved, taken from another seed; or nested and repeated in the text."""
    value = deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        nodes = list(_nodes(value))
        if not nodes:
            break
        parent, key = rng.choice(nodes)
        edit = rng.randrange(6)
        if edit == 0:
            parent.pop(key)
        elif edit == 1:
            parent[key] = deepcopy(rng.choice(INTERESTING_VALUES))
        elif edit == 2:
            donor, taken = rng.choice(list(_nodes(rng.choice(others))) or [(parent, key)])
            parent[taken if isinstance(parent, dict) and isinstance(donor, dict) else key] = deepcopy(donor[taken])
        elif edit == 3 and isinstance(parent[key], int | float):
            parent[key] = rng.choice(
                (parent[key] + 1, parent[key] - 1, parent[key] * 2, -parent[key], str(parent[key]))
            )
        elif edit == 4:
            parent[key] = [deepcopy(parent[key])] * rng.choice((1, 2, 50))
        elif isinstance(parent, dict):
            parent[rng.choice(("x", key + "_", "rope_" + key, "\ud800"))] = deepcopy(parent[key])
    text = json.dumps(value)
    trick = rng.randrange(20)
    if trick == 0 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + "," + text[1:]  # every key twice
    elif trick == 1:
        depth = rng.choice((10, 60, 70, 5000))
        text = text.replace(rng.choice(("null", "1", "true")), "[" * depth + "]" * depth, 1)
    return text.encode("utf-8", "surrogatepass")


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every node below the root."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        for key in keys:
            found.append((at, key))
            waiting.append(at[key])
    return found


def split_weights(data: bytes) -> tuple[bytes, bytes]:
    """A weight file -> the text of its header, its data."""
    n = int.from_bytes(data[:8], "little")
    return data[8 : 8 + n], data[8 + n :]


def join_weights(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data
