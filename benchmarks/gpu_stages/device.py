"""The GPU as the stages use it: small kernels beside the device sources of the package, times, clocks."""

from __future__ import annotations

import os
import re
import subprocess
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashformer.backends.cuda.cache import cubin_of, key
from flashformer.backends.cuda.driver import Gpu, LostContextError
from flashformer.backends.cuda.nvrtc import (
    ENTRY,
    SPECIALIZATION,
    Source,
    architecture,
    device_headers,
    resources,
    version,
)
from flashformer.errors import DeviceError

from .record import OutOfTimeError, Record
from .watch import HungError, WatchedGpu

HERE = Path(__file__).resolve().parent
QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
NAMED = ("kRows", "kTimes", "kBodyFormat", "kBodyGroup", "kHeadFormat", "kHeadDimPadded")  # what tells kernels apart
CONSTANT = re.compile(r"(k\w+) = (\d+);")
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


class Compiler:
    """Source -> cubin. What is known early is compiled ahead in other processes, as NVRTC compiles one after another;
    a compile that fails does so when its cubin is asked for. It may be asked by several threads at once, as a kernel
    loads all of its cubins: the record, which is not made for that, is theirs one after another.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._pool: ProcessPoolExecutor | None = None
        self._begun: dict[Source, Future[bytes]] = {}
        self._noting = Lock()
        self._resources: dict[str, dict[str, int]] = record.document()["results"].get("kernels", {})

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __call__(self, one: Source) -> bytes:
        try:
            cubin = self._begun[one].result() if one in self._begun else cubin_of(one)
        except BrokenProcessPool:  # one of them was killed, and with it what all of them were to do
            cubin = cubin_of(one)
        self._note(one, cubin)
        return cubin

    def prepare(self, sources: Iterable[Source]) -> None:
        """Begins with those that are new, in their order."""
        for one in sources:
            if one not in self._begun:
                if self._pool is None:
                    self._pool = ProcessPoolExecutor(host_cores(), get_context("spawn"))
                with suppress(BrokenProcessPool):
                    self._begun[one] = self._pool.submit(cubin_of, one)

    def _note(self, one: Source, cubin: bytes) -> None:
        """Registers, stack and code of a whole kernel, by what it was made for."""
        constants = dict(CONSTANT.findall(dict(one.headers).get(SPECIALIZATION, "")))
        name = " ".join([*(f"{what}={constants.get(what)}" for what in NAMED), key(one)[:8]])
        with self._noting, suppress(ValueError):  # not a whole kernel
            self._resources[name] = asdict(resources(cubin, ENTRY))
            self._record.result("kernels", self._resources)


@contextmanager
def failing(record: Record, name: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """An error of that kind inside is a failed check `name`, and the stage goes on; without a context it cannot."""
    try:
        yield
    except OutOfTimeError:
        raise
    except kind as error:
        note_failure(record, name, error)
        if is_lost(error):
            raise


def note_failure(record: Record, name: str, error: Exception) -> None:
    record.result(f"traceback of {name}", "".join(traceback.format_exception(error)))
    if isinstance(error, HungError):
        record.result(f"memory after {name}", error.found)
    record.check(name, False, f"{type(error).__name__}: {error}")


def is_lost(error: Exception) -> bool:
    """Whether nothing works on the GPU any more, by our own word or PyTorch's."""
    return isinstance(error, LostContextError) or "CUDA error:" in str(error)


class Memory:
    """Device memory that is given back together; an error while it was used goes before one of giving it back."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._taken: list[int] = []

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        for address in reversed(self._taken):
            with suppress(*(DeviceError,) if kind else ()):
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
        self._gpu.finish()  # pinning waits for kernels, and without end
        pinned = self._gpu.pinned(found.nbytes)
        try:
            self._gpu.read(pinned, address)
            self._gpu.finish()
            found.reshape(-1).view(np.uint8)[:] = pinned
        finally:
            self._gpu.unpin(pinned)
        return found


def open_gpu(record: Record) -> WatchedGpu:
    """The GPU, with what it is and its clocks in the record."""
    gpu = WatchedGpu()
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
    """Clocks, power and throttling as nvidia-smi has them; null where it is missing or hangs. Sets nothing."""
    if record.facts.get("clocks_before", {}) is not None:  # what did not answer once is not asked again
        record.about(**{name: _queried()})


def _queried() -> dict[str, str] | None:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(QUERY.split(","), (v.strip() for v in done.stdout.strip().split(",")), strict=False))


def commit() -> str:
    """As the variable COMMIT says, or of the checkout; `unknown` where neither is known."""
    if given := os.environ.get("COMMIT"):
        return given
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def host_cores() -> int:
    return len(os.sched_getaffinity(0))
