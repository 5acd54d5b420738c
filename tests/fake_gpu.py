"""A Gpu in host memory: addresses that are checked, copies that happen at `finish`, launches that a test computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda_models import H100
from numpy.typing import NDArray

from flashformer.backends.cuda.driver import GpuInfo
from flashformer.backends.cuda.launch import LAUNCH
from flashformer.backends.cuda.specialize import DeviceFacts
from flashformer.errors import DeviceError

Launched = Callable[["FakeGpu", np.void], None]


@dataclass
class FakeKernel:
    cubin: bytes
    entry: str
    blocks: int
    threads: int
    shared_bytes: int


@dataclass
class FakeGpu:
    """`run` is what a launch does; of the calls that take something, the one numbered `refuse` fails."""

    run: Launched = lambda gpu, launch: None
    facts: DeviceFacts = H100
    refuse: int = -1
    n_calls: int = 0
    memory: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    pins: list[NDArray[np.uint8]] = field(default_factory=list)
    kernels: list[FakeKernel] = field(default_factory=list)
    launches: list[tuple[FakeKernel, np.void]] = field(default_factory=list)
    queue: list[Callable[[], None]] = field(default_factory=list)
    n_run: int = 0  # jobs that were run
    n_launched: int = 0  # kernels that were run
    marks: dict[int, int] = field(default_factory=dict)
    closed: bool = False
    end: int = 1 << 40

    def __post_init__(self) -> None:
        self.info = GpuInfo(self.facts, "GPU-fake", "13.0", 80 << 30)

    def _call(self, name: str) -> None:
        assert not self.closed
        if name in ("free", "unpin", "unload", "close"):
            return
        self.n_calls += 1
        if self.n_calls - 1 == self.refuse:
            raise DeviceError(f"{name} was refused")

    def at(self, address: int, n_bytes: int) -> NDArray[np.uint8]:
        """The bytes there; they lie in one allocation."""
        begin = max(a for a in self.memory if a <= address)
        found = self.memory[begin][address - begin :][:n_bytes]
        assert len(found) == n_bytes, f"{n_bytes} bytes at {address} leave their allocation"
        return found

    def read_now(self, address: int, dtype: Any, n: int) -> NDArray[Any]:
        return self.at(address, n * np.dtype(dtype).itemsize).view(dtype)

    def pinned_at(self, address: int, dtype: Any, n: int) -> NDArray[Any]:
        """What the GPU sees of the memory of the host."""
        begins = [int(pin.ctypes.data) for pin in self.pins]
        begin, pin = next((b, p) for b, p in zip(begins, self.pins, strict=True) if b <= address < b + len(p))
        found = pin[address - begin :][: n * np.dtype(dtype).itemsize].view(dtype)
        assert len(found) == n
        return found

    def allocate(self, n_bytes: int) -> int:
        self._call("allocate")
        address = self.end
        self.end += -(-n_bytes // 4096) * 4096 + 4096
        self.memory[address] = np.full(n_bytes, 0xA5, np.uint8)
        return address

    def free(self, address: int) -> None:
        self._call("free")
        del self.memory[address]

    def pinned(self, n_bytes: int) -> NDArray[np.uint8]:
        self._call("pinned")
        self.pins.append(np.full(n_bytes, 0xA5, np.uint8))
        return self.pins[-1]

    def unpin(self, memory: NDArray[np.uint8]) -> None:
        self._call("unpin")
        self.pins = [pin for pin in self.pins if pin is not memory]

    def write(self, address: int, data: NDArray[Any]) -> None:
        self._call("write")
        assert data.flags.c_contiguous

        def copy() -> None:
            self.at(address, data.nbytes)[:] = data.reshape(-1).view(np.uint8)

        self.queue.append(copy)

    def read(self, out: NDArray[Any], address: int) -> None:
        self._call("read")
        assert any(np.shares_memory(out, pin) for pin in self.pins)

        def copy() -> None:
            out.reshape(-1).view(np.uint8)[:] = self.at(address, out.nbytes)

        self.queue.append(copy)

    def zero(self, address: int, n_bytes: int) -> None:
        self._call("zero")
        self.queue.append(lambda: self.at(address, n_bytes).fill(0))

    def load(self, cubin: bytes, entry: str, blocks: int, threads: int, shared_bytes: int) -> FakeKernel:
        self._call("load")
        self.kernels.append(FakeKernel(cubin, entry, blocks, threads, shared_bytes))
        return self.kernels[-1]

    def unload(self, kernel: FakeKernel) -> None:
        self._call("unload")
        self.kernels.remove(kernel)

    def launch(self, kernel: FakeKernel, argument: NDArray[np.void]) -> None:
        self._call("launch")
        assert kernel in self.kernels
        copied = argument.copy()[0]
        self.launches.append((kernel, copied))
        if argument.dtype == LAUNCH:
            self.queue.append(lambda: self._launched(copied))

    def mark(self, event: int) -> None:
        self._call("mark")
        self.marks[event] = self.n_run + len(self.queue)

    def wait(self, event: int) -> None:
        self._call("wait")
        self._run_until(self.marks[event])

    def finish(self) -> None:
        self._call("finish")
        self._run_until(self.n_run + len(self.queue))

    def run_launches(self, n: int) -> None:
        """Until so many were run in all."""
        while self.n_launched < n:
            self._run_until(self.n_run + 1)

    def _launched(self, argument: np.void) -> None:
        self.n_launched += 1
        self.run(self, argument)

    def _run_until(self, end: int) -> None:
        while self.queue and self.n_run < end:
            self.n_run += 1
            self.queue.pop(0)()

    def seconds(self, work: Callable[[], None]) -> float:
        for _ in range(2):
            work()
        self.finish()
        return 0.001 * len(self.launches)

    def close(self) -> None:
        self._call("close")
        self.closed = True
