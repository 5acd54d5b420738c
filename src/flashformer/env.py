"""Every FLASHFORMER_* environment variable, read in this one place."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RequestError

ISAS = ("portable", "avx2", "avx512", "amx", "neon")
PREFETCHES = ("never", "once", "twice")  # as `Asks` in csrc/forward.h numbers them


def isa() -> str | None:
    """FLASHFORMER_ISA: the instruction set to use instead of the best one this CPU has."""
    value = os.environ.get("FLASHFORMER_ISA")
    if value is not None and value not in ISAS:
        raise RequestError(f"FLASHFORMER_ISA={value!r}: expected one of {', '.join(ISAS)}")
    return value


def prefetch(by_default: str) -> str:
    """FLASHFORMER_PREFETCH: how often the CPU kernel asks for weights early. A test hook; changes speed only."""
    value = os.environ.get("FLASHFORMER_PREFETCH")
    if value is not None and value not in PREFETCHES:
        raise RequestError(f"FLASHFORMER_PREFETCH={value!r}: expected one of {', '.join(PREFETCHES)}")
    return by_default if value is None else value


def cache_folder() -> Path | None:
    """FLASHFORMER_CACHE: where packed weights and compiled kernels are kept, `off` for nowhere.

    Without it below XDG_CACHE_HOME or ~/.cache.
    """
    value = os.environ.get("FLASHFORMER_CACHE")
    if value == "off":
        return None
    if value:
        return Path(value)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "flashformer"
    try:
        return Path.home() / ".cache" / "flashformer"
    except RuntimeError:  # no home folder
        return None


def delays() -> int:
    """FLASHFORMER_DELAYS: seed of random delays in the thread team, 0 for none. A test hook."""
    value = os.environ.get("FLASHFORMER_DELAYS", "0")
    if not value.isdecimal() or int(value) >= 2**64:
        raise RequestError(f"FLASHFORMER_DELAYS={value!r}: expected an integer from 0 to 2^64 - 1")
    return int(value)


def api_key() -> str | None:
    """FLASHFORMER_API_KEY: what clients of the HTTP server must send, where the command line does not say."""
    return os.environ.get("FLASHFORMER_API_KEY") or None
