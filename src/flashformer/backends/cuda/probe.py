"""The read bandwidth of a GPU, by a kernel that only reads: device/probe.cuh."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .driver import Gpu
from .nvrtc import Source, architecture, device_headers

ENTRY = "flashformer_probe"
THREADS = 512
BLOCKS_PER_SM = 2
LEAST_BYTES = 256 << 20  # caches hold a part of less
REPEATS = 3

PROBE = np.dtype([("data", "<u8"), ("n_bytes", "<u8"), ("sink", "<u8")])


def probe_source(capability: tuple[int, int]) -> Source:
    """Raises DeviceError as `architecture` does."""
    return Source('#include "probe.cuh"\n', tuple(sorted(device_headers().items())), architecture(capability))


def probe_gb_s(gpu: Gpu, address: int, n_bytes: int, compiler: Callable[[Source], bytes]) -> float | None:
    """The best of a few reads of [address, address + n_bytes), 1e9 bytes/s; None where caches would hold it."""
    if n_bytes < LEAST_BYTES:
        return None
    facts = gpu.info.facts
    kernel = gpu.load(compiler(probe_source(facts.capability)), ENTRY, facts.n_sm * BLOCKS_PER_SM, THREADS, 0)
    sink = gpu.allocate(4)
    try:
        argument = np.array([(address, n_bytes, sink)], PROBE)
        seconds = [gpu.seconds(lambda: gpu.launch(kernel, argument)) for _ in range(1 + REPEATS)]
        return n_bytes / min(seconds[1:]) / 1e9
    finally:
        gpu.free(sink)
        gpu.unload(kernel)
