"""One GPU through the driver: what it is, its memory, kernels on it. All calls of cuda.bindings.driver are here.

`Gpu` is what the kernel needs of it, so that tests can put another one in its place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import DeviceError, UnavailableError
from .nvrtc import INSTALL
from .specialize import MIN_CAPABILITY, DeviceFacts

LIBRARY = "libcuda.so.1"


class LostContextError(DeviceError):
    """Nothing on the GPU can be used by this process any more."""


@dataclass(frozen=True)
class GpuInfo:
    """A GPU as the driver describes it."""

    facts: DeviceFacts
    uuid: str
    driver: str  # newest CUDA version it supports, e.g. `13.0`
    memory_bytes: int

    @property
    def summary(self) -> str:
        """In one phrase."""
        facts = self.facts
        size = f"{self.memory_bytes / 2**30:.0f} GiB"
        return f"{facts.name} ({facts.arch}, {facts.n_sm} multiprocessors, {size}, {self.uuid})"


class Gpu(Protocol):
    """Addresses are of device memory. Copies and launches are queued in one order; `finish` waits for all of them, and
    until then the arrays that they use must live. Every method raises DeviceError.
    """

    info: GpuInfo

    def allocate(self, n_bytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def pinned(self, n_bytes: int) -> NDArray[np.uint8]:
        """Host memory that copies are fast from and to."""
        ...

    def unpin(self, memory: NDArray[np.uint8]) -> None: ...
    def write(self, address: int, data: NDArray[Any]) -> None: ...
    def read(self, out: NDArray[Any], address: int) -> None: ...
    def zero(self, address: int, n_bytes: int) -> None: ...
    def load(self, cubin: bytes, entry: str, blocks: int, threads: int, shared_bytes: int) -> Any:
        """A kernel whose `blocks` run all at once."""
        ...

    def unload(self, kernel: Any) -> None: ...
    def launch(self, kernel: Any, argument: NDArray[np.void]) -> None:
        """`argument` is copied before this returns."""
        ...

    def mark(self, event: int) -> None:
        """Event 0 or 1 is what has been queued so far."""
        ...

    def wait(self, event: int) -> None:
        """For what was queued before that event was marked."""
        ...

    def finish(self) -> None: ...
    def seconds(self, work: Callable[[], None]) -> float:
        """How long the GPU takes for what `work` queues, behind the same once more: it never waits for Python."""
        ...

    def close(self) -> None: ...


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver at all."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


@cache
def _bindings() -> Any:
    """The module cuda.bindings.driver, initialised. Raises DeviceError in one line."""
    if not has_driver():
        raise DeviceError(f"no NVIDIA driver here ({LIBRARY} cannot be loaded)")
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(f"the library that speaks to the NVIDIA driver is missing ({error}): {INSTALL}") from error
    try:
        result = driver.cuInit(0)[0]
    except RuntimeError as error:
        raise DeviceError(f"the NVIDIA driver is too old for this cuda-bindings ({error}): update it") from error
    _require(driver, (result,), "starting the NVIDIA driver")
    return driver


def find_gpus() -> list[GpuInfo]:
    """The GPUs that this process may use, CUDA_VISIBLE_DEVICES heeded. Raises DeviceError in one line."""
    driver = _bindings()
    (n,) = _require(driver, driver.cuDeviceGetCount(), "counting GPUs")
    return [_describe(driver, _require(driver, driver.cuDeviceGet(i), f"GPU {i}")[0]) for i in range(n)]


def find_gpu() -> GpuInfo:
    """The first of them. Raises DeviceError in one line where there is none, or it is too old."""
    gpus = find_gpus()
    if not gpus:
        raise DeviceError("no GPU is visible to this process: check CUDA_VISIBLE_DEVICES")
    facts = gpus[0].facts
    if facts.capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, c)) for c in (facts.capability, MIN_CAPABILITY))
        raise DeviceError(f"{facts.name} has compute capability {found}, the CUDA kernel needs {needed}")
    return gpus[0]


def _require(driver: Any, result: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """What a call gives behind its status. Raises DeviceError with the driver's own name of the error."""
    status = result[0]
    if status == driver.CUresult.CUDA_SUCCESS:
        return result[1:]
    message = f"{what} failed: {_error_text(driver, status)}"
    if status.name in _LOST:
        raise LostContextError(f"{message}. The GPU's context is lost: start the process anew, and report this")
    raise DeviceError(message + _ADVICE.get(status.name, ""))


def _error_text(driver: Any, status: Any) -> str:
    known, text = driver.cuGetErrorString(status)
    if known != driver.CUresult.CUDA_SUCCESS or not text:
        return str(status.name)
    return f"{status.name} ({text.decode(errors='replace')})"


_LOST = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ASSERT", "CONTEXT_IS_DESTROYED", "ECC_UNCORRECTABLE", "HARDWARE_STACK_ERROR", "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION", "INVALID_ADDRESS_SPACE", "INVALID_PC", "LAUNCH_FAILED", "LAUNCH_TIMEOUT",
        "MISALIGNED_ADDRESS",
    )
)  # fmt: skip
_ADVICE = {
    "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": ". Another process or MPS holds a part of the GPU",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": ". The driver is older than NVRTC: update it, or take an older nvidia-cuda-nvrtc",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": ". The driver is older than NVRTC: update it",
    "CUDA_ERROR_NO_DEVICE": ". No GPU is visible to this process: check CUDA_VISIBLE_DEVICES",
}


def _describe(driver: Any, device: Any) -> GpuInfo:
    attributes = driver.CUdevice_attribute

    def attribute(name: str) -> int:
        key = getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_require(driver, driver.cuDeviceGetAttribute(key, device), f"reading {name} of the GPU")[0])

    (name,) = _require(driver, driver.cuDeviceGetName(256, device), "reading the GPU's name")
    (uuid,) = _require(driver, driver.cuDeviceGetUuid(device), "reading the GPU's UUID")
    (memory,) = _require(driver, driver.cuDeviceTotalMem(device), "reading the GPU's memory size")
    (version,) = _require(driver, driver.cuDriverGetVersion(), "reading the driver's version")
    facts = DeviceFacts(
        name=name.split(b"\0")[0].decode(errors="replace"),
        n_sm=attribute("MULTIPROCESSOR_COUNT"),
        shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        capability=(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
    )
    return GpuInfo(facts, _uuid_text(bytes(uuid.bytes)), f"{version // 1000}.{version % 1000 // 10}", int(memory))


def _uuid_text(raw: bytes) -> str:
    """As nvidia-smi and CUDA_VISIBLE_DEVICES have it."""
    text = raw[:16].hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


@dataclass(frozen=True)
class _Loaded:
    library: Any
    function: Any
    blocks: int
    threads: int
    shared_bytes: int


class DriverGpu:
    """A Gpu over the driver: the device's primary context and one stream."""

    def __init__(self, index: int = 0) -> None:
        """Raises DeviceError."""
        self._driver = driver = _bindings()
        (self._device,) = self._call("cuDeviceGet", index, what=f"opening GPU {index}")
        self.info = _describe(driver, self._device)
        (self._context,) = self._call("cuDevicePrimaryCtxRetain", self._device, what=f"opening {self.info.facts.name}")
        self._open = True
        try:
            self._enter()
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
            (self._stream,) = self._call("cuStreamCreate", flags, what="making a stream")
            plain = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value
            self._events = [self._call("cuEventCreate", plain, what="making an event")[0] for _ in range(2)]
        except BaseException:
            driver.cuDevicePrimaryCtxRelease(self._device)  # what went wrong first is what counts
            raise

    def _call(self, name: str, *arguments: Any, what: str) -> tuple[Any, ...]:
        return _require(self._driver, getattr(self._driver, name)(*arguments), what)

    def _enter(self) -> None:
        """A context is current in one thread; requests come from several."""
        self._call("cuCtxSetCurrent", self._context, what="using the GPU")

    def allocate(self, n_bytes: int) -> int:
        self._enter()
        result = self._driver.cuMemAlloc(n_bytes)
        if result[0] == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = self._call("cuMemGetInfo", what="reading free memory")
            raise UnavailableError(
                f"{n_bytes:,} bytes cannot be had on {self.info.facts.name}: {free:,} of {total:,} are free; "
                "lower ctx or streams, choose a smaller format, or end what else uses the GPU"
            )
        return int(_require(self._driver, result, f"allocating {n_bytes:,} bytes")[0])

    def free(self, address: int) -> None:
        self._enter()
        self._call("cuMemFree", address, what="freeing memory")

    def pinned(self, n_bytes: int) -> NDArray[np.uint8]:
        self._enter()
        (address,) = self._call("cuMemHostAlloc", n_bytes, 0, what=f"pinning {n_bytes:,} bytes of host memory")
        return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(int(address)))

    def unpin(self, memory: NDArray[np.uint8]) -> None:
        self._enter()
        self._call("cuMemFreeHost", memory.ctypes.data, what="freeing host memory")

    def write(self, address: int, data: NDArray[Any]) -> None:
        assert data.flags.c_contiguous
        self._enter()
        self._call("cuMemcpyHtoDAsync", address, data.ctypes.data, data.nbytes, self._stream, what="copying to the GPU")

    def read(self, out: NDArray[Any], address: int) -> None:
        assert out.flags.c_contiguous
        self._enter()
        self._call("cuMemcpyDtoHAsync", out.ctypes.data, address, out.nbytes, self._stream, what="copying from the GPU")

    def zero(self, address: int, n_bytes: int) -> None:
        self._enter()
        self._call("cuMemsetD8Async", address, 0, n_bytes, self._stream, what="clearing memory")

    def load(self, cubin: bytes, entry: str, blocks: int, threads: int, shared_bytes: int) -> Any:
        driver = self._driver
        self._enter()
        (library,) = self._call("cuLibraryLoadData", cubin, [], [], 0, [], [], 0, what="loading the kernel")
        try:
            (kernel,) = self._call("cuLibraryGetKernel", library, entry.encode(), what=f"finding {entry}")
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            what = f"asking for {shared_bytes:,} bytes of shared memory per block"
            self._call("cuKernelSetAttribute", most, shared_bytes, kernel, self._device, what=what)
            (function,) = self._call("cuKernelGetFunction", kernel, what=f"readying {entry}")
            self._call("cuFuncSetAttribute", function, most, shared_bytes, what=what)  # what is asked and launched
            (per_sm,) = self._call(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, shared_bytes, what="asking what fits"
            )
            if (fitting := per_sm * self.info.facts.n_sm) < blocks:
                raise DeviceError(
                    f"{blocks} blocks of {entry} must run at once, but {fitting} fit on {self.info.summary}: "
                    "is a part of the GPU taken by MPS?"
                )
        except DeviceError:
            driver.cuLibraryUnload(library)
            raise
        return _Loaded(library, function, blocks, threads, shared_bytes)

    def unload(self, kernel: Any) -> None:
        self._enter()
        self._call("cuLibraryUnload", kernel.library, what="unloading a kernel")

    def launch(self, kernel: Any, argument: NDArray[np.void]) -> None:
        arguments = np.array([argument.ctypes.data], np.uint64)  # the driver takes pointers to the arguments
        self._enter()
        self._call(
            "cuLaunchCooperativeKernel",
            kernel.function,
            *(kernel.blocks, 1, 1),
            *(kernel.threads, 1, 1),
            kernel.shared_bytes,
            self._stream,
            arguments.ctypes.data,
            what="launching the kernel",
        )

    def mark(self, event: int) -> None:
        self._enter()
        self._call("cuEventRecord", self._events[event], self._stream, what="marking what was queued")

    def wait(self, event: int) -> None:
        self._enter()
        self._call("cuEventSynchronize", self._events[event], what="running the kernel")

    def finish(self) -> None:
        self._enter()
        self._call("cuStreamSynchronize", self._stream, what="running the kernel")

    def seconds(self, work: Callable[[], None]) -> float:
        self._enter()
        events = [self._call("cuEventCreate", 0, what="making an event")[0] for _ in range(2)]
        try:
            work()
            self._call("cuEventRecord", events[0], self._stream, what="noting the time")
            work()
            self._call("cuEventRecord", events[1], self._stream, what="noting the time")
            self.finish()
            (ms,) = self._call("cuEventElapsedTime", *events, what="reading the time")
        finally:
            for event in events:
                self._driver.cuEventDestroy(event)
        return float(ms) / 1e3

    def close(self) -> None:
        if self._open:
            self._open = False
            self._enter()
            for event in self._events:
                self._driver.cuEventDestroy(event)
            self._driver.cuStreamDestroy(self._stream)
            self._call("cuDevicePrimaryCtxRelease", self._device, what="closing the GPU")
