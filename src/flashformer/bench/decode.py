"""Decode speed beside this machine's read bandwidth, both measured in turns; and the speed of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter_ns
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Want
from ..engine import LLM
from ..engine.plan import weight_read_bytes
from ..engine.request import integer
from ..engine.setup import kv_read_bytes
from ..errors import DeviceError, RequestError
from ..program.ir import KEY_CHUNK

BLOCK_S = 0.5  # aim of a block of runs; at most a second unless one forward takes longer
PROBE_S = 0.3
MIN_PAIRS = 9
FAULT = 1.03  # a fraction above this means that the probe was too slow
WARM_UP = 3
TOKEN_SEED = 1


class Probe(Protocol):
    """Reads the memory that weights lie in as fast as it can."""

    def gb_s(self, seconds: float) -> float:
        """Measured for about so long."""


@dataclass(frozen=True)
class WeightsProbe:
    """By the kernel's own workers, over the packed weights: on a GPU."""

    llm: LLM

    def gb_s(self, seconds: float) -> float:
        found = self.llm.kernel.probe_weights()
        assert found is not None, "the caches hold the weights"
        return found


@dataclass(frozen=True)
class BenchOptions:
    """`rows`: one decode test each, with that many slots of one row. Raises RequestError."""

    prompt_tokens: int = 512  # of the prefill test; 0: none
    new_tokens: int = 64
    rows: tuple[int, ...] = (1, 2, 4, 8)
    depth: int = 0  # positions cached before the first measured token
    repeat: int = 5

    def __post_init__(self) -> None:
        integer("prompt_tokens", self.prompt_tokens, (0, 1 << 20))
        integer("new_tokens", self.new_tokens, (1, 1 << 20))
        integer("depth", self.depth, (0, 1 << 30))
        integer("repeat", self.repeat, (1, 10_000))
        if not self.rows:
            raise RequestError("rows: expected at least one number from 1 to 16")
        for rows in self.rows:
            integer("rows", rows, (1, 16))

    @property
    def start(self) -> int:
        """Position of the first measured token: at least one token is cached."""
        return max(self.depth, 1)

    def ctx(self, max_positions: int) -> int:
        """Positions per slot that the tests need, in whole chunks. Raises RequestError."""
        need = max(self.start + self.new_tokens, self.prompt_tokens)
        if need > max_positions:
            raise RequestError(
                f"depth {self.depth} and {self.new_tokens} new tokens, or {self.prompt_tokens} of a prompt, need "
                f"{need} positions, the model has {max_positions}: lower --depth, --new-tokens or --prompt-tokens"
            )
        return min(-(-need // KEY_CHUNK) * KEY_CHUNK, max_positions)


@dataclass(frozen=True)
class BenchResult:
    """One line of results. A forward of `decode` makes one token in each of `rows` slots; `prefill` is one prompt."""

    test: str  # "decode" | "prefill"
    rows: int
    depth: int
    tokens_per_s: float  # all slots together, from the median forward; of a prompt from its median time
    ms_per_token: dict[str, float]  # median, min, max over forwards: the time from token to token of a slot
    weight_bytes: int  # read per forward
    kv_bytes: int  # read per forward by all slots, mean over the run
    gb_per_s: float | None  # None, as the next two, for prefill, which is not limited by memory
    probe_gb_per_s: float | None
    fraction: float | None
    device: str
    threads: int
    quant: str
    model: str
    commit: str

    def to_json(self) -> dict[str, object]:
        """Without what a test has no figure for."""
        bandwidth = ("gb_per_s", "probe_gb_per_s", "fraction")
        return {k: v for k, v in asdict(self).items() if self.test == "decode" or k not in bandwidth}


def bench_prefill(llm: LLM, options: BenchOptions, commit: str) -> BenchResult:
    """Measures a prompt of `prompt_tokens` in one slot, in chunks as the engine cuts it; nothing is cached before."""
    n = options.prompt_tokens
    ids = np.random.default_rng(TOKEN_SEED).integers(0, llm.spec.vocab_size, n, np.int32)
    prompt_ns: list[int] = []
    with llm.turns.lock:
        llm.turns.check()
        llm.forget()
        for _ in range(1 + options.repeat):  # the first to warm up
            begin = perf_counter_ns()
            fill(llm, 0, ids, Want.TOKEN)
            prompt_ns.append(perf_counter_ns() - begin)
    ms = [ns / 1e6 / n for ns in prompt_ns[1:]]
    positions = range(llm.setup.prompt_chunk, n + llm.setup.prompt_chunk, llm.setup.prompt_chunk)
    kv_bytes = [kv_read_bytes(llm.spec, llm.setup.target.kv_format, min(end, n)) for end in positions]
    return BenchResult(
        test="prefill",
        rows=1,
        depth=0,
        tokens_per_s=1e3 / median(ms),
        ms_per_token={"median": median(ms), "min": min(ms), "max": max(ms)},
        weight_bytes=weight_read_bytes(llm.program),
        kv_bytes=sum(kv_bytes) // len(kv_bytes),
        gb_per_s=None,
        probe_gb_per_s=None,
        fraction=None,
        device=llm.setup.device,
        threads=llm.setup.target.n_workers,
        quant=_quant(llm),
        model=llm.name,
        commit=commit,
    )


def _quant(llm: LLM) -> str:
    return quant.name if (quant := llm.setup.target.body_quant) else "none"


def bench_decode(llm: LLM, options: BenchOptions, rows: int, probe: Probe | None, commit: str) -> BenchResult:
    """Measures greedy decoding of `rows` slots; EOS does not end it.

    Blocks of forwards and of the probe take turns. `fraction` is the median over blocks of the block's GB/s
    against the mean of the probes before and after it. Every repeat must give the same tokens, or DeviceError.
    """
    weight_bytes = weight_read_bytes(llm.program)
    with llm.turns.lock:
        llm.turns.check()
        llm.forget()
        steps = _steps(llm, options, rows)
        warm_up = [next(steps) for _ in range(WARM_UP)]
        total = options.new_tokens * options.repeat
        estimate_ns = max(min(ns for ns, _ in warm_up), 1)
        per_block = max(1, min(int(BLOCK_S * 1e9 / estimate_ns), total))
        n_blocks = max(MIN_PAIRS, -(-total // per_block))
        step_ns: list[int] = []
        kv_bytes: list[int] = []  # read by all slots, per forward
        block_gb_s: list[float] = []
        probes = [probe.gb_s(PROBE_S)] if probe else []
        for _ in range(n_blocks):
            block = [next(steps) for _ in range(per_block)]
            kv_bytes += [rows * kv_read_bytes(llm.spec, llm.setup.target.kv_format, n) for _, n in block]
            n_bytes = per_block * weight_bytes + sum(kv_bytes[-per_block:])
            block_gb_s.append(n_bytes / sum(ns for ns, _ in block))
            step_ns += [ns for ns, _ in block]
            if probe:
                probes.append(probe.gb_s(PROBE_S))
    kv_per_step = sum(kv_bytes) // len(kv_bytes)
    middle = median(step_ns)
    return BenchResult(
        test="decode",
        rows=rows,
        depth=options.depth,
        tokens_per_s=rows * 1e9 / middle,
        ms_per_token={"median": middle / 1e6, "min": min(step_ns) / 1e6, "max": max(step_ns) / 1e6},
        weight_bytes=weight_bytes,
        kv_bytes=kv_per_step,
        gb_per_s=(weight_bytes + kv_per_step) / middle,
        probe_gb_per_s=median(probes) if probes else None,
        fraction=median(pair_ratios(block_gb_s, probes)) if probes else None,
        device=llm.setup.device,
        threads=llm.setup.target.n_workers,
        quant=_quant(llm),
        model=llm.name,
        commit=commit,
    )


def pair_ratios(block_gb_s: list[float], probes: list[float]) -> list[float]:
    """Each block against the mean of the probes before and after it; there is one probe more than blocks."""
    return [
        gb_s * 2 / (before + after) for gb_s, before, after in zip(block_gb_s, probes[:-1], probes[1:], strict=True)
    ]


def _steps(llm: LLM, options: BenchOptions, n_rows: int) -> Iterator[tuple[int, int]]:
    """Endless forwards: (ns from the last token to this one, positions read by each slot).

    Every `new_tokens` forwards go back to `start` and must then repeat the tokens of the first time.
    """
    rng = np.random.default_rng(TOKEN_SEED)
    prompts = rng.integers(0, llm.spec.vocab_size, (n_rows, options.start), np.int32)
    first = rng.integers(0, llm.spec.vocab_size, n_rows, np.int32)
    for slot in range(n_rows):
        fill(llm, slot, prompts[slot])
    kernel, rows, start = llm.kernel, llm.kernel.rows, options.start
    expected: list[NDArray[np.int32]] = []
    rows.slot[:n_rows] = np.arange(n_rows)
    rows.want[:n_rows] = Want.TOKEN
    rows.temperature[:n_rows] = rows.adjust_begin[:n_rows] = rows.adjust_end[:n_rows] = 0
    while True:
        rows.token[:n_rows] = first
        for offset in range(options.new_tokens):
            begin = perf_counter_ns()
            rows.pos[:n_rows] = start + offset
            kernel.forward(n_rows, () if offset + 1 < options.new_tokens else None)
            rows.token[:n_rows] = kernel.tokens[:n_rows]
            ns = perf_counter_ns() - begin
            if len(expected) < options.new_tokens:
                expected.append(kernel.tokens[:n_rows].copy())
            elif not np.array_equal(expected[offset], kernel.tokens[:n_rows]):
                raise DeviceError(
                    f"token {offset} of {n_rows} slots was {expected[offset].tolist()} and is now "
                    f"{kernel.tokens[:n_rows].tolist()}: the kernel is not deterministic; please report it"
                )
            yield ns, start + offset + 1


def fill(llm: LLM, slot: int, ids: NDArray[np.int32], want: Want = Want.NOTHING) -> None:
    """Caches a prompt, of which the last row may want something."""
    rows, chunk = llm.kernel.rows, llm.setup.prompt_chunk
    for begin in range(0, len(ids), chunk):
        part = ids[begin : begin + chunk]
        n = len(part)
        rows.token[:n] = part
        rows.slot[:n] = slot
        rows.pos[:n] = np.arange(begin, begin + n)
        rows.want[:n] = Want.NOTHING
        if begin + n == len(ids):
            rows.want[n - 1] = want
            rows.temperature[n - 1] = rows.adjust_begin[n - 1] = rows.adjust_end[n - 1] = 0
        llm.kernel.forward(n)
