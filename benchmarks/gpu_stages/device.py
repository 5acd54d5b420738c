"""The GPU as the stages use it: small kernels beside the device sources of the package, times, clocks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashformer.backends.cuda.cache import cubin_of
from flashformer.backends.cuda.driver import DriverGpu, Gpu
from flashformer.backends.cuda.nvrtc import Source, architecture, device_headers, version
from flashformer.errors import DeviceError, NumericalError

from .record import Record

HERE = Path(__file__).resolve().parent
QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
SPEC_GB_S = {"H100": 3350.0, "H200": 4800.0}  # of the SXM boards


@cache
def stage_sources() -> dict[str, str]:
    """Name -> text of the CUDA sources here."""
    return {path.name: path.read_text() for path in sorted(HERE.glob("*.cu"))}


def source(name: str, capability: tuple[int, int], specialization: Source | None = None) -> Source:
    """Of the file `name`; one that needs the constants of a kernel gets them from its source."""
    headers = dict(specialization.headers) if specialization else dict(device_headers())
    headers |= stage_sources()
    return Source(f'#include "{name}"\n', tuple(sorted(headers.items())), architecture(capability))


@dataclass
class Compiler:
    """Source -> cubin; many at once in processes of their own, as NVRTC compiles one after another."""

    _made: dict[Source, bytes] = field(default_factory=dict)

    def __call__(self, one: Source) -> bytes:
        if one not in self._made:
            self._made[one] = cubin_of(one)
        return self._made[one]

    def prepare(self, sources: Iterable[Source]) -> int:
        """Compiles those that are new; how many."""
        new = [one for one in dict.fromkeys(sources) if one not in self._made]
        if len(new) > 1:
            with ProcessPoolExecutor(min(len(new), os.cpu_count() or 1), get_context("spawn")) as pool:
                self._made.update(zip(new, pool.map(cubin_of, new), strict=True))
        return len(new)


@contextmanager
def failing(record: Record, name: str) -> Iterator[None]:
    """What goes wrong on the GPU inside is a failed check `name`, and the stage goes on."""
    try:
        yield
    except (DeviceError, NumericalError) as error:
        record.check(name, False, f"{type(error).__name__}: {error}")


class Memory:
    """Device memory that is given back together."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._taken: list[int] = []

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *error: object) -> None:
        for address in reversed(self._taken):
            self._gpu.free(address)

    def zeros(self, n_bytes: int) -> int:
        address = self._gpu.allocate(n_bytes)
        self._taken.append(address)
        self._gpu.zero(address, n_bytes)
        return address

    def of(self, data: NDArray[Any]) -> int:
        """A copy of `data` there."""
        whole = np.ascontiguousarray(data)
        address = self.zeros(whole.nbytes)
        self._gpu.write(address, whole)
        self._gpu.finish()
        return address

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        found: NDArray[Any] = np.empty(shape, dtype)
        pinned = self._gpu.pinned(found.nbytes)
        try:
            self._gpu.read(pinned, address)
            self._gpu.finish()
            found.reshape(-1).view(np.uint8)[:] = pinned
        finally:
            self._gpu.unpin(pinned)
        return found


def open_gpu(record: Record) -> DriverGpu:
    """The GPU, with what it is and its clocks in the record."""
    gpu = DriverGpu()
    facts = gpu.info.facts
    record.about(
        gpu=facts.name,
        multiprocessors=facts.n_sm,
        shared_bytes=facts.shared_bytes,
        driver=gpu.info.driver,
        nvrtc=version(),
        spec_gb_s=spec_gb_s(facts.name),
        commit=commit(),
    )
    note_clocks(record, "clocks_before")
    return gpu


def spec_gb_s(name: str) -> float | None:
    """Bandwidth as the maker states it; None for a GPU that is not listed."""
    if "PCIe" in name or "NVL" in name:
        return None
    return next((value for part, value in SPEC_GB_S.items() if part in name), None)


def note_clocks(record: Record, name: str) -> None:
    """Clocks, power and throttling as nvidia-smi has them; null where it is missing. Sets nothing."""
    record.about(**{name: _queried()})


def _queried() -> dict[str, str] | None:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(QUERY.split(","), (v.strip() for v in done.stdout.strip().split(",")), strict=False))


def commit() -> str:
    """Of the checkout; `unknown` where git is missing or this is no checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def host_cores() -> int:
    return len(os.sched_getaffinity(0))
