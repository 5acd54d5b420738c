"""A kernel on the simulated GPU: registers its memory, chooses a schedule, runs it, and reads what was found."""

from __future__ import annotations

import ctypes
import weakref
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_THREADS = 288


class Kind(IntEnum):
    MUTABLE = 1  # written during the launch
    CONSTANT = 2


class Policy(IntEnum):
    """How the next warp is chosen. MIXED draws one of the others from the seed."""

    MIXED = 0
    RANDOM = 1
    LONG = 2
    ROUND_ROBIN = 3
    PRIORITY = 4


class Mode(IntEnum):
    """What is left of a site. UNORDERED keeps its effect (arrival, meeting, value) and drops the ordering."""

    ON = 0
    OFF = 1
    UNORDERED = 2


class Stats(ctypes.Structure):
    """calls of wrappers, steps and switches of the scheduler, rounds in which only polls could run, copies, polls."""

    calls: int
    steps: int
    switches: int
    idle: int
    copies: int
    polls: int
    _fields_ = [(name, ctypes.c_uint64) for name in ("calls", "steps", "switches", "idle", "copies", "polls")]


@cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, u32, u64, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p
    for name, result, arguments in (
        ("ff_create", pointer, [u32, u32, u32]),
        ("ff_destroy", None, [pointer]),
        ("ff_register_region", ctypes.c_int, [pointer, pointer, u64, text, u32, u32]),
        ("ff_remove_regions", None, [pointer]),
        ("ff_name_shared", None, [pointer, u32, u32, text]),
        ("ff_abort_flag", None, [pointer, pointer]),
        ("ff_option", ctypes.c_int, [pointer, text, ctypes.c_longlong]),
        ("ff_switch_site", ctypes.c_int, [pointer, u32, u32]),
        ("ff_run", ctypes.c_int, [pointer, pointer]),
        ("ff_error_text", text, [pointer]),
        ("ff_stats", None, [pointer, ctypes.POINTER(Stats)]),
        ("ff_n_sites", u32, []),
        ("ff_site_name", text, [u32]),
        ("ff_site_count", u64, [pointer, u32]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Simulator:
    """One simulated GPU with the kernel of `library`. Options: seed, policy, stop_at_deadlock (1), idle_rounds,
    idle_cycles, max_steps,
    max_calls, expect_tx_delta (bytes added to what every expect_tx expects)."""

    def __init__(self, library: Path, n_blocks: int, shared_bytes: int, n_threads: int = BLOCK_THREADS, **options: int):
        self._library = _library(library)
        self._machine = self._library.ff_create(n_blocks, n_threads, shared_bytes)
        assert self._machine, (n_blocks, n_threads, shared_bytes)
        weakref.finalize(self, self._library.ff_destroy, self._machine)
        self._kept: list[NDArray[Any]] = []
        self.option(**options)

    def option(self, **options: int) -> None:
        for name, value in options.items():
            assert self._library.ff_option(self._machine, name.encode(), value) == 0, (name, value)

    def register(self, array: NDArray[Any], name: str, kind: Kind, initialised: bool = True) -> int:
        """The address of the array, which the kernel may now access. During a launch it holds poison if it is mutable:
        only wrappers see what is in it, and what is written around them is found."""
        assert array.flags.c_contiguous
        assert array.ctypes.data % 16 == 0
        self._kept.append(array)
        code = self._library.ff_register_region(
            self._machine, array.ctypes.data, array.nbytes, name.encode(), kind, int(initialised)
        )
        assert code == 0, f"{name} overlaps a region registered before"
        return int(array.ctypes.data)

    def mutable(self, array: NDArray[Any], name: str, initialised: bool = True) -> int:
        return self.register(array, name, Kind.MUTABLE, initialised)

    def constant(self, array: NDArray[Any], name: str) -> int:
        return self.register(array, name, Kind.CONSTANT)

    def name_shared(self, offset: int, n_bytes: int, name: str) -> None:
        self._library.ff_name_shared(self._machine, offset, n_bytes, name.encode())

    def abort_flag(self, address: int) -> None:
        """Once the kernel has written this word, accesses are no longer checked for order."""
        self._library.ff_abort_flag(self._machine, address)

    def sites(self) -> list[str]:
        return [self._library.ff_site_name(i).decode() for i in range(self._library.ff_n_sites())]

    def switch(self, site: str, mode: Mode) -> None:
        assert self._library.ff_switch_site(self._machine, self.sites().index(site), mode) == 0

    def run(self, launch: ctypes.Structure) -> str:
        """Runs one launch. The finding that stopped it, or an empty text."""
        code = self._library.ff_run(self._machine, ctypes.byref(launch))
        text = self._library.ff_error_text(self._machine).decode()
        assert (code == 0) == (text == "")
        return str(text)

    def stats(self) -> Stats:
        stats = Stats()
        self._library.ff_stats(self._machine, ctypes.byref(stats))
        return stats

    def counts(self) -> dict[str, int]:
        """How often each site was reached in the last launch."""
        names = self.sites()
        return {name: int(self._library.ff_site_count(self._machine, i)) for i, name in enumerate(names)}


def aligned(shape: int | tuple[int, ...], dtype: Any, alignment: int = 128) -> NDArray[Any]:
    """An array of zeros whose address is a multiple of `alignment`, as device memory has it."""
    dtype = np.dtype(dtype)
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(n_bytes + alignment, np.uint8)
    begin = -raw.ctypes.data % alignment
    found: NDArray[Any] = raw[begin : begin + n_bytes].view(dtype).reshape(shape)
    return found
