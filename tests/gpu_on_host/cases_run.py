"""The three small kernels of cases/ with their memory, ready to run."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
from gpu_on_host.build import build_case
from gpu_on_host.simulator import Simulator, aligned
from numpy.typing import NDArray

CASES = Path(__file__).parent / "cases"


def names(case: str, enum: str) -> list[str]:
    """The enumerators of an enum in a case, in order."""
    body = re.search(rf"enum {enum} : u32 \{{(.*?)\}};", (CASES / case).read_text(), re.S)
    assert body
    return re.findall(r"k\w+", body.group(1))


def _fields(pointers: str, numbers: str) -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_uint32) for name in numbers.split()),
    ]


class RingLaunch(ctypes.Structure):
    _fields_ = _fields("weights x counter", "base n_phases n_slots variation")


class FaultLaunch(ctypes.Structure):
    _fields_ = _fields("data fresh fixed counter", "fault spin_limit")


class PrimitiveLaunch(ctypes.Structure):
    _fields_ = _fields("in out", "what n")


class Ring:
    """The ring kernel with random weights, and what it must compute."""

    N_BLOCKS, N_PHASES, N_SLOTS, OUTPUTS, SLOT_WORDS = 3, 4, 5, 8, 512
    SHARED_BYTES = 3 * 2048 + 64 + 256 + 4 * 32 * 8 * 4
    SOUND, RELEASE_PER_GROUP, CACHED_X, LATE_FENCE = range(4)

    def __init__(self, seed: int, variation: int = SOUND, base: int = 0xFFFFFFFA, **options: int):
        random = np.random.default_rng(seed)
        n = self.N_BLOCKS * self.OUTPUTS
        self.weights = aligned((self.N_BLOCKS, self.N_PHASES, self.N_SLOTS, self.SLOT_WORDS), np.uint32)
        self.weights[:] = random.integers(0, 2**32, self.weights.shape, np.uint32)
        self.x = aligned((2, n), np.uint32)
        self.x[0] = random.integers(0, 2**32, n, np.uint32)
        self.expected = self.reference()
        self.counter = aligned(1, np.uint32)
        self.counter[0] = base  # by default arrivals wrap around in the middle of the launch
        library = build_case(CASES / "ring.cpp", [])
        self.simulator = Simulator(library, self.N_BLOCKS, self.SHARED_BYTES, n_threads=160, seed=seed, **options)
        self.simulator.name_shared(0, 3 * 2048, "ring")
        self.launch = RingLaunch(
            self.simulator.constant(self.weights, "weights"),
            self.simulator.mutable(self.x, "x"),
            self.simulator.mutable(self.counter, "counter"),
            base,
            self.N_PHASES,
            self.N_SLOTS,
            variation,
        )

    def reference(self) -> NDArray[np.uint32]:
        x: NDArray[np.uint32] = self.x[0]
        words = np.arange(self.SLOT_WORDS)
        for phase in range(self.N_PHASES):
            turned = np.stack([x[(words + t) % x.size] for t in range(self.OUTPUTS)], 1)  # (words, outputs)
            x = np.matmul(self.weights[:, phase].sum(1, dtype=np.uint32), turned, dtype=np.uint32).reshape(-1)
        return x

    def run(self) -> str:
        return self.simulator.run(self.launch)

    def correct(self) -> bool:
        return bool(np.array_equal(self.x[self.N_PHASES % 2], self.expected))


class Faults:
    """The kernel of small mistakes; `fault` is a name of its enum."""

    def __init__(self, fault: str, seed: int, **options: int):
        self.simulator = Simulator(build_case(CASES / "faults.cpp", []), 2, 1024, n_threads=64, seed=seed, **options)
        self.data, self.fresh, self.fixed, self.counter = (aligned(256, np.uint32) for _ in range(4))
        self.launch = FaultLaunch(
            self.simulator.mutable(self.data, "data"),
            self.simulator.mutable(self.fresh, "fresh", initialised=False),
            self.simulator.constant(self.fixed, "fixed"),
            self.simulator.mutable(self.counter, "counter"),
            names("faults.cpp", "Fault").index(fault),
            100_000,
        )

    def run(self) -> str:
        return self.simulator.run(self.launch)


def primitive(what: str, rows: NDArray[np.uint32], n_blocks: int = 1, seed: int = 1) -> NDArray[np.uint32]:
    """(n, 4) results of one wrapper; rows (n, up to 10) u32 operands, n a multiple of 64."""
    n = rows.shape[0]
    operands, results = aligned((n, 10), np.uint32), aligned((n, 4), np.uint32)
    operands[:, : rows.shape[1]] = rows
    simulator = Simulator(build_case(CASES / "primitives.cpp", []), n_blocks, 1024, n_threads=64, seed=seed)
    launch = PrimitiveLaunch(
        simulator.constant(operands, "in"),
        simulator.mutable(results, "out", initialised=False),
        names("primitives.cpp", "What").index(what),
        n,
    )
    assert simulator.run(launch) == ""
    return results
