"""Stage 1: what the parts of the design cost on this GPU: M1 to M3, M5, M6 and M8 of the plan of measurements.

M1 read ceiling over slot size and ring depth, M2 contiguous against interleaved, M3 hand-offs between all blocks, idle
and with memory busy, uneven work with the ring on, M5 pauses of the consumers, M6 weights to sums, M8 launches.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import numpy as np

from flashformer.backends.cuda.launch import LAUNCH
from flashformer.backends.cuda.nvrtc import Source, compile_cubin, source_of
from flashformer.backends.cuda.specialize import THREADS, DeviceFacts, Specialization, specialize
from flashformer.check import CheckedProgram, check
from flashformer.formats import Format, find_quant
from flashformer.model.outline import read_outline
from flashformer.program import build, fragments

from .device import Compiler, Memory, failing, note_clocks, open_gpu, source
from .record import Clock, Record, spread
from .stream import IN_VAIN, STREAM, Block, Read, Reader
from .target import cuda_target
from .watch import WatchedGpu

DATA_BYTES, PERIOD_BYTES = 2 << 30, 64 << 20
SLOTS = tuple(n << 10 for n in (4, 8, 16, 32))
RINGS = tuple(n << 10 for n in (32, 64, 96, 128, 160, 208))
REPEATS = 5
WARM_S = 0.3  # of reads, after which clocks are as high as they get
PASSES = 50  # of dequant.cu over its slots
FORMATS = ("none", "int8-g128", "int8-g32", "int4-g128", "int4-g32")


@dataclass(frozen=True)
class Bench:
    record: Record
    clock: Clock
    gpu: WatchedGpu
    compiler: Compiler


def run(record: Record, clock: Clock) -> None:
    gpu = open_gpu(record)
    try:
        with Compiler(record) as compiler:
            compiler.prepare(kernels(gpu.info.facts))
            record.about(data_bytes=DATA_BYTES, repeats=REPEATS)
            for part in record.units(PARTS, lambda part: part.__name__.strip("_")):
                clock.require(part.__name__)
                with failing(record, f"{part.__name__.strip('_')}: runs"):
                    part(Bench(record, clock, gpu, compiler))
        note_clocks(record, "clocks_after")
    finally:
        gpu.close()


def _reads(bench: Bench) -> None:
    with Memory(bench.gpu) as memory:
        reader = _reader(bench.gpu, bench.compiler, memory)
        _warm_up(bench.clock, reader)
        _grid(bench.record, bench.clock, reader)
        _hand_offs(bench.record, bench.clock, reader)


def _reader(gpu: WatchedGpu, compiler: Compiler, memory: Memory) -> Reader:
    period = np.random.default_rng().integers(0, 256, PERIOD_BYTES, np.uint8)
    address = memory.zeros(DATA_BYTES)
    for begin in range(0, DATA_BYTES, PERIOD_BYTES):
        gpu.write(address + begin, period)
    gpu.finish()
    return Reader(gpu, compiler, address, DATA_BYTES, Block(period))


def _warm_up(clock: Clock, reader: Reader) -> None:
    """A GPU that had nothing to do runs slowly at first. Wrong reads are left to the checks."""
    read, left_s = reader.filling(Read()), WARM_S
    while left_s > 0:
        clock.require("warming up")
        times, wrong = reader.seconds(read, REPEATS)
        if wrong:
            return
        left_s -= sum(times)


class BrokenRingError(Exception):
    """Waits in vain take long, and more of them say nothing new."""


def _timed(record: Record, reader: Reader, name: str, read: Read, shown: bool = False) -> float | None:
    """GB/s, into the record, if the sums are right."""
    record.now(name)
    times, wrong = reader.seconds(read, REPEATS)
    n_bytes = reader.bytes_of(read)
    if not record.check(name, not wrong, wrong or "sums of all words"):
        if wrong.endswith(IN_VAIN):
            raise BrokenRingError(name)
        return None
    rates = spread([n_bytes / t / 1e9 for t in times])
    more = {"rates": rates, "bytes": n_bytes, "sm_mhz": reader.sm_mhz}
    record.speed(name, rates["median"], "GB/s", check=name, shown=shown, **more)
    return rates["median"]


def _grid(record: Record, clock: Clock, reader: Reader) -> None:
    """M1, M2."""
    best: tuple[float, Read] | None = None
    for slot, ring in itertools.product(SLOTS, RINGS):
        clock.require("M1")
        read = reader.filling(Read(slot, ring))
        found = _timed(record, reader, f"M1 slots of {slot >> 10} KB, ring of {ring >> 10} KB", read)
        if found is not None and (best is None or found > best[0]):
            best = found, read
    if best is None:
        return
    clock.require("M2")
    where = f"{best[1].slot_bytes >> 10} KB x {best[1].n_slots}"
    _timed(record, reader, f"M1 best: {where}", best[1], shown=True)
    _timed(record, reader, f"M2 interleaved, {where}", replace(best[1], interleaved=True), shown=True)


def _hand_offs(record: Record, clock: Clock, reader: Reader) -> None:
    """M3, M5: us per round beyond what the same reads take without."""
    rounds, base = 240, Read(16384, 192 << 10)
    items = min(32, reader.filling(base).n_items // rounds)
    busy = replace(base, n_items=items, rounds=rounds)
    kinds = {
        "M3 barrier, memory idle": (replace(base, rounds=rounds, barriers=True), replace(base, rounds=rounds)),
        "M3 barrier, memory busy": (replace(busy, barriers=True), busy),
        "M3 barrier, uneven by a quarter": (replace(busy, barriers=True, uneven=items // 4), busy),
        "M5 pauses of 2000 cycles": (replace(busy, bubble_cycles=2000), busy),
        "M5 pauses of 6000 cycles": (replace(busy, bubble_cycles=6000), busy),
        "M5 pauses of 2000 cycles, ring of 32 KB": (
            replace(busy, bubble_cycles=2000, ring_bytes=32 << 10),
            replace(busy, ring_bytes=32 << 10),
        ),
    }
    for name, (read, plain) in kinds.items():
        clock.require(name)
        record.now(name)
        (with_it, wrong), (without, wrong_too) = reader.seconds(read, REPEATS), reader.seconds(plain, REPEATS)
        if not record.check(name, not wrong + wrong_too, wrong + wrong_too or "sums of all words, no wait in vain"):
            continue
        us = [(a - median(without)) / rounds * 1e6 for a in with_it]
        more = {"round_us": median(with_it) / rounds * 1e6, "plain_round_us": median(without) / rounds * 1e6}
        record.speed(name, median(us), "us more a round", check=name, shown=True, us=spread(us), **more)


def _launches(bench: Bench) -> None:
    """M8: from one cooperative launch of nothing to the next; and how long NVRTC takes."""
    record, gpu, compiler = bench.record, bench.gpu, bench.compiler
    name, n = "M8 launch to launch", 200
    cubin, n_sm = compiler(source("stream.cu", gpu.info.facts.capability)), gpu.info.facts.n_sm
    with Memory(gpu) as memory:
        argument = np.zeros(1, STREAM)
        argument["sums"], argument["counter"] = memory.zeros(4 * n_sm), memory.zeros(8)
        argument["clock"] = memory.zeros(16)
        argument["slot_bytes"], argument["n_slots"], argument["rounds"] = 4096, 2, 1
        argument["bubble"] = 40_000_000  # cycles: until all launches are queued, so that Python is not measured
        busy, empty = (gpu.load(cubin, entry, n_sm, THREADS, 16384) for entry in ("stream_read", "nothing"))

        def launch_all(n_empty: int) -> None:
            gpu.launch(busy, argument)
            for _ in range(n_empty):
                gpu.launch(empty, argument)

        def timed(n_empty: int) -> list[float]:
            return [gpu.seconds(lambda: launch_all(n_empty)) for _ in range(1 + REPEATS)][1:]

        try:
            alone = median(timed(1))
            us = [(t - alone) / n * 1e6 for t in timed(1 + n)]
        finally:
            gpu.unload(busy)
            gpu.unload(empty)
    record.check(name, True, "the launches ended")
    record.speed(name, median(us), "us", check=name, shown=True, us=spread(us))
    one = _specialization(gpu.info.facts, "none")
    begin = time.perf_counter()
    _, log = compile_cubin(source_of(one))
    seconds = time.perf_counter() - begin
    record.result("M8 NVRTC log", log.splitlines()[-4:])
    record.check("M8 NVRTC", True, "compiled")
    record.speed("M8 NVRTC", seconds, "s", check="M8 NVRTC", shown=True)


@cache
def _checked(n_sm: int, quant: str) -> CheckedProgram:
    spec = read_outline("shape:llama-3.2-1b").spec
    return check(build(spec, cuda_target(n_sm, quant=find_quant(quant), ctx=512)))


def _specialization(facts: DeviceFacts, quant: str, n_cols: int = 8) -> Specialization:
    return specialize(_checked(facts.n_sm, quant), facts, n_rows=n_cols)


def kernels(facts: DeviceFacts) -> Iterator[Source]:
    """All that the stage loads, first what is asked for first."""
    yield source("stream.cu", facts.capability)
    for kind in _kinds():
        yield _dequant_source(facts, *kind)[1]


def _dequant_source(facts: DeviceFacts, quant: str, n_cols: int) -> tuple[Specialization, Source]:
    one = _specialization(facts, quant, n_cols)
    return one, source("dequant.cu", facts.capability, source_of(one))


def _dequant(bench: Bench) -> None:
    """M6: bytes of packed weights per clock and multiprocessor."""
    record, gpu = bench.record, bench.gpu
    for quant, n_cols in _kinds():
        name = f"M6 {'bf16' if quant == 'none' else quant}, {n_cols} columns"
        bench.clock.require(name)
        record.now(name)
        one, text = _dequant_source(gpu.info.facts, quant, n_cols)
        kernel = gpu.load(bench.compiler(text), "dequant", one.n_workers, THREADS, one.shared_bytes)
        try:
            with Memory(gpu) as memory:
                argument = np.zeros(1, LAUNCH)
                argument["spin_limit"] = PASSES
                cycles = memory.zeros(8 * one.n_workers)
                sums = memory.zeros(4 * one.n_workers * 256)
                argument["times"], argument["accumulators"], argument["model"] = cycles, sums, sums
                for _ in range(2):
                    gpu.launch(kernel, argument)
                took = memory.read(cycles, (one.n_workers,), np.uint64).astype(float)
                found = memory.read(sums, (one.n_workers, 256), np.float32)
        finally:
            gpu.unload(kernel)
        expected = _expected_sum(quant, one)
        error = float(np.abs(found / expected - 1).max())
        if not record.check(name, error < 0.01, f"sums within {error:.1e} of {expected:.4g}"):
            continue
        fmt = one_format(quant)
        n_bytes = PASSES * one.n_slots * fragments.slot_units(fmt) * fragments.unit_bytes(fmt)
        rates = spread([n_bytes / t for t in took])
        record.speed(name, rates["median"], "bytes/clock", check=name, shown=n_cols == 8, rates=rates)


def _kinds() -> Iterator[tuple[str, int]]:
    for n_cols in (8, 16):
        for quant in FORMATS:
            yield quant, n_cols


def one_format(quant: str) -> Format:
    return find_quant(quant) or cuda_target(1).weight_format


def _expected_sum(quant: str, one: Specialization) -> float:
    """Of a thread, where all of shared memory is words 0x2C012C01: every element, row, scale and code made of them."""
    fmt = one_format(quant)
    half = float(np.array([0x2C01], np.uint16).view(np.float16)[0])
    if not fmt.scale_group:
        brain = float(np.array([0x2C010000], np.uint32).view(np.float32)[0])
        each = brain * brain
    else:
        codes = (0x01, 0x2C) if fmt.bits == 8 else (0x1, 0x0, 0xC, 0x2)
        each = (sum(codes) / len(codes) - fmt.zero) * half * half
    k = PASSES * one.n_slots * fragments.slot_units(fmt) // fragments.WARPS * fragments.unit_k(fmt)
    return each * k * 4 * (one.n_cols // 8)


PARTS = (_reads, _launches, _dequant)
