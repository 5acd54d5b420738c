"""A Gpu whose kernels run on the simulator: memory is host memory, a cubin is the text of specialization.h, and every
access of a launch is checked."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fake_gpu import FakeGpu, FakeKernel
from gpu_on_host.build import DEVICE, build, simulator_objects
from gpu_on_host.simulator import Kind, Mode, Simulator, aligned
from numpy.typing import NDArray

from flashformer.backends.cuda.launch import FLAG, LAUNCH, POINTERS
from flashformer.backends.cuda.nvrtc import SPECIALIZATION, Source

WRITTEN = ("kv", "work", "counter", "report", "accumulators", "times", "adjust_kept")


def compiler(source: Source) -> bytes:
    """Of CudaKernel."""
    return dict(source.headers)[SPECIALIZATION].encode()


class FindingError(AssertionError):
    """What the simulator found in a launch."""


class Builder:
    """Libraries by header and folder of the device source, built side by side while tests go on."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._started: dict[tuple[str, Path], Future[Path]] = {}

    def start(self, header: str, device: Path) -> Future[Path]:
        if (header, device) not in self._started:
            simulator_objects()  # here, or every thread would make them
            self._started[header, device] = self._pool.submit(build, header, [], device=device)
        return self._started[header, device]

    def give_up(self) -> None:
        """Forgets what is not being built yet."""
        self._started = {key: future for key, future in self._started.items() if not future.cancel()}


BUILDER = Builder()


class Argument(ctypes.Structure):
    """A launch record as ctypes passes it."""

    _fields_ = [("bytes", ctypes.c_char * LAUNCH.itemsize)]


@dataclass
class HostGpu(FakeGpu):
    """`rope_begin`: where in the work region begins what is constant; `n_slots` of the ring, all if 0; `device`, the
    folder of the device source; `ahead`: kernels are built when they are loaded, not when they are launched first.
    `options` of the simulator and `sites` that are switched may change between launches.
    """

    rope_begin: int = 0
    n_slots: int = 0
    device: Path = DEVICE
    ahead: bool = False
    options: dict[str, int] = field(default_factory=dict)
    sites: dict[str, Mode] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # of the sites in the last launch
    simulators: list[tuple[FakeKernel, Simulator]] = field(default_factory=list)

    def allocate(self, n_bytes: int) -> int:
        self._call("allocate")
        memory = aligned(n_bytes, np.uint8)
        memory[:] = 0xA5
        address = int(memory.ctypes.data)
        self.memory[address] = memory
        return address

    def load(self, cubin: bytes, entry: str, blocks: int, threads: int, shared_bytes: int) -> FakeKernel:
        kernel = super().load(cubin, entry, blocks, threads, shared_bytes)
        if self.ahead:
            BUILDER.start(self._header(kernel), self.device)
        return kernel

    def launch(self, kernel: FakeKernel, argument: NDArray[np.void]) -> None:
        self._call("launch")
        assert any(kernel is loaded for loaded in self.kernels)
        copied = argument.copy()
        self.launches.append((kernel, copied[0]))
        self.queue.append(lambda: self._launch_now(kernel, copied))

    def close(self) -> None:
        self.simulators = []  # a stack per GPU thread: of many kernels more than a process may have
        super().close()

    def _header(self, kernel: FakeKernel) -> str:
        header = kernel.cubin.decode()
        if self.n_slots:
            header, n = re.subn(r"kSlots = \d+;", f"kSlots = {self.n_slots};", header)
            assert n == 1
        return header

    def _launch_now(self, kernel: FakeKernel, argument: NDArray[np.void]) -> None:
        simulator = next((s for k, s in self.simulators if k is kernel), None) or self._start(kernel, argument[0])
        simulator.option(**self.options)
        for site in simulator.sites():
            simulator.switch(site, self.sites.get(site, Mode.ON))
        found = simulator.run(Argument.from_buffer(argument.view(np.uint8).data))
        self.counts = simulator.counts()
        if found:
            raise FindingError(found)

    def _start(self, kernel: FakeKernel, launch: np.void) -> Simulator:
        library = BUILDER.start(self._header(kernel), self.device).result()
        simulator = Simulator(library, kernel.blocks, kernel.shared_bytes, kernel.threads)
        for name, array, kind in self._regions(launch):
            simulator.register(array, name, kind)
        simulator.abort_flag(int(launch["report"]) + 4 * FLAG)
        self.simulators.append((kernel, simulator))
        return simulator

    def _regions(self, launch: np.void) -> Iterator[tuple[str, NDArray[np.uint8], Kind]]:
        pins = ((int(pin.ctypes.data), pin) for pin in self.pins)
        found = next(pin for at, pin in pins if at <= int(launch["results"]) < at + len(pin))
        yield "results", found, Kind.MUTABLE  # and `failed`
        for name in (name for name in POINTERS if launch[name] and name not in ("results", "failed")):
            memory = self.memory[int(launch[name])]
            if name == "work":
                if self.rope_begin < len(memory):
                    yield "rope", memory[self.rope_begin :], Kind.CONSTANT
                memory = memory[: self.rope_begin]
            yield name, memory, Kind.MUTABLE if name in WRITTEN else Kind.CONSTANT
