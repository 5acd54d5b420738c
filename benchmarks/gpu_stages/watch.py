"""A GPU that is not waited for without end: what hangs on it is looked at from beside, and then left alone."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashformer.backends.cuda.driver import DriverGpu, LostContextError
from flashformer.backends.cuda.kernel import CudaKernel

LIMIT_S = 20.0  # of one wait
LOOK_S = 2.0  # that a look from beside may take
SPIN_S = 0.01  # waits are this long before they sleep
WINDOW_BYTES = 1 << 20


class HungError(LostContextError):
    """What was queued did not end. `found`: the watched memory, as u32 words."""

    def __init__(self, message: str, found: dict[str, list[int]]) -> None:
        super().__init__(message)
        self.found = found


class WatchedGpu(DriverGpu):
    """`watched`: name -> (address, bytes) of what to look at when a wait takes more than `limit_s`.

    Once the context, which is the process's only one, is lost, nothing is given back: it would fail, or wait for what
    never ends.
    """

    lost = False

    def __init__(self, index: int = 0, limit_s: float = LIMIT_S) -> None:
        super().__init__(index)
        self.watched: dict[str, tuple[int, int]] = {}
        self._limit_s = limit_s
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        (self._beside,) = self._call("cuStreamCreate", flags, what="making a second stream")
        self._window = self.pinned(WINDOW_BYTES)

    def _call(self, name: str, *arguments: Any, what: str) -> tuple[Any, ...]:
        try:
            return super()._call(name, *arguments, what=what)
        except LostContextError:
            WatchedGpu.lost = True
            raise

    def finish(self) -> None:
        self._enter()
        self._await("cuStreamQuery", self._stream)

    def wait(self, event: int) -> None:
        self._enter()
        self._await("cuEventQuery", self._events[event])

    def _await(self, query: str, handle: Any) -> None:
        if not self._done(query, handle, self._limit_s):
            WatchedGpu.lost = True
            found = {name: self._look(*place) for name, place in self.watched.items()}
            raise HungError(f"what runs on the GPU did not end in {self._limit_s:.0f} s", found)

    def _done(self, query: str, handle: Any, limit_s: float) -> bool:
        """Whether it is within that time. Raises DeviceError."""
        begin = time.monotonic()
        while getattr(self._driver, query)(handle)[0] == self._driver.CUresult.CUDA_ERROR_NOT_READY:
            waited = time.monotonic() - begin
            if waited > limit_s:
                return False
            if waited > SPIN_S:
                time.sleep(0.001)
        self._call(query, handle, what="running the kernel")
        return True

    def _look(self, address: int, n_bytes: int) -> list[int]:
        """Nothing where the copy does not end either."""
        n = min(n_bytes, WINDOW_BYTES)
        at = self._window.ctypes.data
        self._call("cuMemcpyDtoHAsync", at, address, n, self._beside, what="looking at the GPU")
        if not self._done("cuStreamQuery", self._beside, LOOK_S):
            return []
        found: list[int] = self._window[:n].view(np.uint32).tolist()
        return found

    def free(self, address: int) -> None:
        if not self.lost:
            super().free(address)

    def unpin(self, memory: NDArray[np.uint8]) -> None:
        if not self.lost:
            super().unpin(memory)

    def unload(self, kernel: Any) -> None:
        if not self.lost:
            super().unload(kernel)

    def close(self) -> None:
        if self._open and not self.lost:
            self.unpin(self._window)
            self._driver.cuStreamDestroy(self._beside)
            super().close()


def context_lost() -> bool:
    """Whether nothing of this process works on the GPU any more."""
    return WatchedGpu.lost


def watch(kernel: CudaKernel) -> None:
    """Arrivals, report and times of a kernel are looked at when it hangs."""
    gpu = kernel._gpu
    if not isinstance(gpu, WatchedGpu):
        return  # of a test
    gpu.watched = {
        "counter": (kernel._counter, 4),
        "report": (kernel._report_at, kernel._report.nbytes),
    }
    if kernel._timed:
        gpu.watched["times"] = (kernel._times_at, kernel._times.nbytes)
