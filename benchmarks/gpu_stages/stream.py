"""Reads by bulk copies through a ring, as the kernel reads its weights: stream.cu, checked and timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashformer.backends.cuda.driver import Gpu
from flashformer.backends.cuda.specialize import THREADS
from flashformer.errors import DeviceError

from .device import Compiler, Memory, source

STREAM = np.dtype(
    [(n, "<u8") for n in ("data", "sums", "counter", "clock")]
    + [(n, "<u4") for n in ("slot_bytes", "n_slots", "n_items", "uneven", "rounds", "capacity", "barriers", "bubble")],
    align=True,
)
RUNS = 2  # of what a Gpu times: once before, once timed
BARRIER_BYTES = 16  # of a slot: full and empty
IN_VAIN = "waits in vain"
GRAIN = 4096  # bytes of which sums are kept: the smallest slot


@dataclass(frozen=True)
class Read:
    """One way to read. `n_items`: of a block and round; in turns `uneven` more and less."""

    slot_bytes: int = 16384
    ring_bytes: int = 192 << 10
    n_items: int = 0
    uneven: int = 0
    rounds: int = 1
    interleaved: bool = False
    barriers: bool = False
    bubble_cycles: int = 0

    @property
    def n_slots(self) -> int:
        return self.ring_bytes // self.slot_bytes

    def items_of(self, block: int) -> int:
        signs = [1 if (block + r) % 2 else -1 for r in range(2)]
        return self.rounds * self.n_items + self.uneven * (
            signs[0] * ((self.rounds + 1) // 2) + signs[1] * (self.rounds // 2)
        )


class Block:
    """Random bytes that repeat in memory with a known period, and sums of every stretch of them."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        """`data`: one period."""
        self.n_bytes = len(data)
        parts = np.add.reduce(data.view(np.uint32).reshape(-1, GRAIN // 4), axis=1, dtype=np.uint64)
        before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(parts)])
        self._before = before.astype(object)  # Python's integers, which do not overflow

    def total(self, begin: int, end: int) -> int:
        """Of the u32 words in [begin, end), multiples of GRAIN, modulo 2^32."""
        return int((self._until(end) - self._until(begin)) % 2**32)

    def _until(self, end: int) -> int:
        whole, rest = divmod(end, self.n_bytes)
        return int(whole * self._before[-1] + self._before[rest // GRAIN])


class Reader:
    """`data` at `address`, `n_bytes` long; with `block` the sums are checked."""

    def __init__(self, gpu: Gpu, compiler: Compiler, address: int, n_bytes: int, block: Block | None) -> None:
        self._gpu, self._address, self._n_bytes, self._block = gpu, address, n_bytes, block
        self._cubin = compiler(source("stream.cu", gpu.info.facts.capability))
        self.n_blocks = gpu.info.facts.n_sm
        self.sm_mhz = 0.0

    def filling(self, read: Read) -> Read:
        """With so many items that nearly all of the data is read in one round."""
        return replace(read, n_items=self._n_bytes // read.slot_bytes // self.n_blocks, rounds=1)

    def bytes_of(self, read: Read) -> int:
        return sum(read.items_of(b) for b in range(self.n_blocks)) * read.slot_bytes

    def seconds(self, read: Read, repeats: int) -> tuple[list[float], str]:
        """Times after one run to warm up, none where something was wrong; and what that was, sums or waits, else "".
        `sm_mhz` is then the clock of the multiprocessors during the last run.
        """
        most = max((read.items_of(b) for b in range(2)), default=0)
        assert most * self.n_blocks * read.slot_bytes <= self._n_bytes
        assert read.uneven <= read.n_items
        times = []
        with Memory(self._gpu) as memory:
            arguments = [self._argument(read, most, memory) for _ in range(RUNS)]
            shared = read.n_slots * (read.slot_bytes + BARRIER_BYTES)
            kernel = self._gpu.load(self._cubin, "stream_read", self.n_blocks, THREADS, shared)
            try:
                for _ in range(1 + repeats):
                    times.append(self._once(kernel, arguments))
                    for argument in arguments:
                        if wrong := self._wrong(read, most, memory, argument[0]):
                            return [], wrong
                cycles, ns = memory.read(int(arguments[-1]["clock"][0]), (2,), np.uint64).tolist()
                self.sm_mhz = 1e3 * cycles / max(ns, 1)
            finally:
                self._gpu.unload(kernel)
        return times[1:], ""

    def _argument(self, read: Read, most: int, memory: Memory) -> NDArray[np.void]:
        argument = np.zeros(1, STREAM)
        for name in ("slot_bytes", "n_slots", "n_items", "uneven", "rounds", "barriers"):
            argument[name] = getattr(read, name)
        argument["capacity"], argument["bubble"] = 0 if read.interleaved else most, read.bubble_cycles
        argument["data"] = self._address
        for name, n_bytes in (("sums", 4 * self.n_blocks), ("counter", 8), ("clock", 16)):
            argument[name] = memory.zeros(n_bytes)
        return argument

    def _once(self, kernel: Any, arguments: list[NDArray[np.void]]) -> float:
        for argument in arguments:
            self._gpu.zero(int(argument["sums"][0]), 4 * self.n_blocks)
            self._gpu.zero(int(argument["counter"][0]), 8)
        self._gpu.finish()
        turns = iter(arguments)
        return self._gpu.seconds(lambda: self._gpu.launch(kernel, next(turns)))

    def _wrong(self, read: Read, most: int, memory: Memory, argument: np.void) -> str:
        arrivals, in_vain = memory.read(int(argument["counter"]), (2,), np.uint32).tolist()
        if in_vain:
            return f"{in_vain} {IN_VAIN}"
        due = self.n_blocks * read.rounds if read.barriers else 0
        if arrivals != due:
            return f"{arrivals} arrivals, expected {due}"
        if self._block is None:
            return ""
        sums = memory.read(int(argument["sums"]), (self.n_blocks,), np.uint32)
        found = int(sums.sum(dtype=np.uint64) % 2**32)
        expected = 0
        if read.interleaved:
            assert not read.uneven
            expected = self._block.total(0, self.n_blocks * most * read.slot_bytes)
        else:
            for b in range(self.n_blocks):
                begin = b * most * read.slot_bytes
                expected += self._block.total(begin, begin + read.items_of(b) * read.slot_bytes)
        return "" if found == expected % 2**32 else f"the words add up to {found:#x}, not {expected % 2**32:#x}"

    def gb_s(self, read: Read, repeats: int = 5) -> float:
        """1e9 bytes/s, the median, of the data as a whole."""
        read = self.filling(read)
        times, wrong = self.seconds(read, repeats)
        if wrong:
            raise DeviceError(f"reading by bulk copies: {wrong}")
        return self.bytes_of(read) / median(times) / 1e9
