"""Stage 0: every wrapper of device/ptx.cuh gives what its host model gives, on fresh inputs."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashformer.backends.cuda.specialize import THREADS

from . import numbers_model
from .device import Compiler, Memory, failing, note_clocks, open_gpu, source
from .record import Clock, Record
from .watch import WatchedGpu

TEST = np.dtype([("in", "<u8"), ("out", "<u8"), ("words", "<u8"), ("n", "<u8")])
SHARED_BYTES = 64 << 10
N_WORDS = 8
USES, USE_BYTES = 41, 16384
ROUNDS = 1000
U32 = np.uint32

Words = NDArray[Any]


class Bench:
    """Runs an entry of selftest.cu on one block per multiprocessor."""

    def __init__(self, gpu: WatchedGpu, cubin: bytes) -> None:
        self._gpu, self._cubin = gpu, cubin
        self.n_blocks = gpu.info.facts.n_sm

    def __call__(self, entry: str, given: Words, out_words: int, n: int) -> tuple[Words, Words]:
        """(out_words) u32 and the (8) words."""
        with Memory(self._gpu) as memory:
            out, words = memory.zeros(4 * out_words), memory.zeros(4 * N_WORDS)
            argument = np.array([(memory.of(given), out, words, n)], TEST)
            self._gpu.watched = {"words": (words, 4 * N_WORDS)}
            kernel = self._gpu.load(self._cubin, entry, self.n_blocks, THREADS, SHARED_BYTES)
            try:
                self._gpu.launch(kernel, argument)
                self._gpu.finish()
                return memory.read(out, (out_words,), U32), memory.read(words, (N_WORDS,), U32)
            finally:
                self._gpu.unload(kernel)


Finding = tuple[str, bool, str]
Test = Callable[[Bench, np.random.Generator], Iterator[Finding]]


def run(record: Record, clock: Clock) -> None:
    gpu = open_gpu(record)
    seed = record.facts.get("seed", secrets.randbits(32))
    record.about(seed=seed)
    try:
        with Compiler(record) as compiler:
            bench = Bench(gpu, compiler(source("selftest.cu", gpu.info.facts.capability)))
        for test in record.units(TESTS, lambda test: test.__name__):
            clock.require(test.__name__)
            with failing(record, test.__name__):
                for name, passed, detail in test(bench, np.random.default_rng(seed)):
                    record.check(name, passed, detail)
        note_clocks(record, "clocks_after")
    finally:
        gpu.close()


def same(name: str, found: Words, expected: Words) -> Finding:
    """Bit for bit."""
    wrong = np.flatnonzero(found.reshape(-1) != expected.reshape(-1))
    detail = f"{found.size} words"
    if len(wrong):
        at = wrong[0]
        detail = f"{len(wrong)} of {found.size} differ; [{at}] is {found.flat[at]:#x}, not {expected.flat[at]:#x}"
    return name, not len(wrong), detail


def test_mma(bench: Bench, rng: np.random.Generator) -> Iterator[Finding]:
    """c + a b in fp32: against fp64, within the rounding of 16 additions in any order."""
    n = 512
    for kind in ("bf16", "f16"):
        a, b, c = (rng.normal(size=(n, *shape)).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
        a, b = numbers_model.rounded(a, kind), numbers_model.rounded(b, kind)
        given = numbers_model.mma_operands(a, b, c, kind)
        out, _ = bench(f"test_mma_{kind}", given, n * 128, n)
        found = numbers_model.mma_result(out.view(np.float32).reshape(n, 32, 4))
        exact = c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
        size = np.abs(c).astype(np.float64) + np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
        errors = np.nan_to_num(np.abs(found - exact) / size, nan=np.inf)
        at = tuple(map(int, np.unravel_index(errors.argmax(), errors.shape)))
        where = f"at (case, row, column) {at}: {found[at]:.9g}, expected {exact[at]:.9g}"
        detail = f"largest error {errors[at]:.2e} of the sum of magnitudes, {where}"
        yield f"mma_{kind}", bool(errors[at] <= 17 * 2.0**-23), detail


def test_memory(bench: Bench, rng: np.random.Generator) -> Iterator[Finding]:
    n = 5 << 16
    given = rng.integers(0, 256, n, np.uint8)
    out, _ = bench("test_memory", given, 2 * n // 4, n)
    both = out.view(np.uint8).reshape(2, 5, n // 5)
    for i, size in enumerate((1, 2, 4, 8, 16)):
        part = given.reshape(5, -1)[i]
        yield same(f"ld_global, st_global, ld_shared, st_shared of {size}", both[0, i], part)
        yield same(f"ld_const of {size}", both[1, i], part)
    yield "prefetch_l2_bulk", True, "ran"


def test_numbers(bench: Bench, rng: np.random.Generator) -> Iterator[Finding]:
    for name, inputs, outputs in numbers_model.cases(rng):
        n = inputs.shape[1]
        out, _ = bench("test_numbers", inputs, 14 * n, n)
        found = out.reshape(14, n)
        for index, what, expected, is_nan in outputs:
            row = np.where(is_nan(found[index]), numbers_model.ANY_NAN, found[index])
            want = np.where(is_nan(expected), numbers_model.ANY_NAN, expected)
            yield same(f"{what}: {name}", row, want)


def test_record(bench: Bench, rng: np.random.Generator) -> Iterator[Finding]:
    given = rng.integers(0, 2**32, (500, 16), U32)
    out, _ = bench("test_record", given, bench.n_blocks * given.size, len(given))
    everywhere = np.broadcast_to(given, (bench.n_blocks, *given.shape))
    yield same("shared_record", out.reshape(everywhere.shape), everywhere)


def test_shuffles(bench: Bench, rng: np.random.Generator) -> Iterator[Finding]:
    n = 1000
    given = rng.integers(0, 2**32, (n, 32), U32)
    out, _ = bench("test_shuffles", given, n * 12 * 32, n)
    found, lane = out.reshape(n, 12, 32), np.arange(32)
    chosen = np.take_along_axis(given, (7 * lane + np.arange(n)[:, None]) % 32, axis=1)
    for j, mask in enumerate((1, 2, 4, 8, 16, 31)):
        yield same(f"shfl_xor_u32 by {mask}", found[:, j], given[:, lane ^ mask])
    yield same("shfl_xor_i32", found[:, 6], given[:, lane ^ 5])
    yield same("shfl_xor_f32", found[:, 7], given[:, lane ^ 9])
    for j, kind in ((8, "u32"), (9, "i32"), (10, "f32")):
        yield same(f"shfl_idx_{kind}", found[:, j], chosen)
    bits = ((given & 1).astype(np.uint64) << lane.astype(np.uint64)).sum(axis=1).astype(U32)
    yield same("ballot", found[:, 11], np.repeat(bits[:, None], 32, axis=1))


def test_threads(bench: Bench, rng: np.random.Generator) -> Iterator[Finding]:
    rounds, t = 200, np.arange(THREADS)
    out, _ = bench("test_threads", np.zeros(1, U32), bench.n_blocks * THREADS * 8, rounds)
    found = out.reshape(bench.n_blocks, THREADS, 8)

    def summed(other: Words, factor: int) -> Words:
        """Over the rounds of other * factor + round, modulo 2^32."""
        return (other.astype(np.uint64) * factor * rounds + rounds * (rounds - 1) // 2).astype(U32)

    def everywhere(values: Words) -> Words:
        return np.broadcast_to(values.astype(U32), (bench.n_blocks, THREADS))

    blocks = np.repeat(np.arange(bench.n_blocks, dtype=U32)[:, None], THREADS, axis=1)
    yield same("thread_index", found[..., 0], everywhere(t))
    yield same("warp_index, lane_index", found[..., 1], everywhere(t))
    yield same("block_index", found[..., 2], blocks)
    yield same("n_blocks", found[..., 3], np.full_like(blocks, bench.n_blocks))
    yield same("bar_sync of the block", found[..., 4], everywhere(summed((t + 37) % THREADS, 1000)))
    consumers = np.where(t < 256, summed((t + 101) % 256, 3000), U32(0))
    yield same("bar_sync of 256 threads", found[..., 5], everywhere(consumers))
    half = np.where(t < 256, summed(t // 128 * 128 + (t + 63) % 128, 5000), U32(0))
    yield same("bar_sync of two halves", found[..., 6], everywhere(half))
    yield same("warp_sync", found[..., 7], everywhere(summed(t // 32 * 32 + (t + 11) % 32, 7000)))


def test_bulk(bench: Bench, rng: np.random.Generator) -> Iterator[Finding]:
    given = rng.integers(0, 2**32, (USES, USE_BYTES // 4), U32)
    out, words = bench("test_bulk", given, given.size, USES)
    found, copied = out.reshape(USES, -1), np.zeros_like(given)
    for use in range(USES):
        n_words = 4 * (use + 1) if use % 5 == 0 else USE_BYTES // 4
        copied[use, :n_words] = given[use, :n_words]
    yield same("bulk_copy, mbarriers over several uses", found, copied)
    yield "mbarrier waits end", words[0] == 0, f"{words[0]} waits in vain"
    yield "a fresh mbarrier's phase 0 is open", words[1] == 0, f"{words[1]} blocks saw it over"


def test_grid(bench: Bench, rng: np.random.Generator) -> Iterator[Finding]:
    n = bench.n_blocks
    out, words = bench("test_grid", np.zeros(1, U32), n + 2 * n * THREADS, ROUNDS)
    yield same("red_relaxed_add", words[:1], np.array([n * ROUNDS], U32))
    yield "ld_acquire sees arrivals", words[2] == 0, f"{words[2]} waits in vain"
    yield "words of other blocks behind fence and acquire", words[3] == 0, f"{words[3]} wrong of {ROUNDS * n * THREADS}"
    yield same("atom_add_acq_rel gives every ticket once", out[:n], np.arange(1, n + 1, dtype=U32))
    yield same("atom_add_relaxed gives every ticket once", words[5:7], np.array([n, n * (n - 1) // 2], U32))
    yield same("st_relaxed, ld_relaxed", words[4:5], np.array([n * ROUNDS + 5], U32))


def test_time(bench: Bench, rng: np.random.Generator) -> Iterator[Finding]:
    naps = 100
    out, _ = bench("test_time", np.zeros(1, U32), 14, naps)
    times = out.view(np.uint64).astype(np.int64)
    cycles, ns = times[:6].reshape(3, 2).T
    yield "clock_ns moves on", 0 < times[6] < 1 << 40, f"its least step is {times[6]} ns"
    yield "clock_cycles grows", bool((np.diff(cycles) > 0).all()), f"{cycles[1] - cycles[0]} cycles"
    yield "clock_ns grows", bool(ns[1] > ns[0] and ns[2] >= ns[1]), f"{ns[1] - ns[0]} ns"
    slept = int(ns[1] - ns[0])
    yield "nanosleep returns", 0 < slept < naps * 100_000, f"{slept / naps:.0f} ns for a nap of 1000"


TESTS: tuple[Test, ...] = (
    test_mma, test_memory, test_record, test_numbers, test_shuffles, test_threads, test_bulk, test_grid, test_time,
)  # fmt: skip
