"""Kernels of all stages compiled into the cache, on any machine with NVRTC: the one with the GPU then has none to make.

The version of NVRTC is part of what names a cubin, so it must be the same on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from flashformer.backends.cuda.cache import cubin_of
from flashformer.backends.cuda.nvrtc import Source, version
from flashformer.backends.cuda.probe import probe_source
from flashformer.backends.cuda.specialize import DeviceFacts
from flashformer.env import cache_folder

from . import micro, models, tiny_models
from .device import host_cores, source
from .families import tiny

FACTS = DeviceFacts("H100", 132, 232448, (9, 0))  # of the SXM boards, H200 too


def sources(facts: DeviceFacts) -> Iterator[Source]:
    """Those of stages 0 to 5."""
    yield source("selftest.cu", facts.capability)
    yield from micro.kernels(facts)
    yield probe_source(facts.capability)
    for case in tiny_models.cases():
        yield from case.kernels(case.checked(tiny(case.model, 0), facts), facts)
    for kinds in models.KINDS.values():
        for kind in kinds:
            yield from kind.kernels(kind.checked(facts), facts)


def fill_cache() -> int:
    """Says how many there are; an exit status. Raises DeviceError for one that cannot be compiled."""
    if cache_folder() is None:
        print("FLASHFORMER_CACHE is off: there is nowhere to put kernels")
        return 1
    all_of_them = list(dict.fromkeys(sources(FACTS)))
    with ProcessPoolExecutor(host_cores(), get_context("spawn")) as pool:
        n_bytes = sum(map(len, pool.map(cubin_of, all_of_them)))
    print(f"{len(all_of_them)} kernels, {n_bytes:,} bytes, by NVRTC {version()} for {FACTS.arch}: {cache_folder()}")
    return 0
