"""The CPU kernel: packs the weights of a CheckedProgram once, then runs one native call per forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ... import env
from ...check import CheckedProgram
from ...checkpoint import PackedWeights, Tensor
from ...errors import DeviceError, UnavailableError
from ...program.ir import MAX_HEAD_ROWS, Space
from ...program.records import FlatProgram, flatten
from .. import nonfinite
from ..base import ADJUST_COLUMNS, ROW_COLUMNS, Kernel, Rows, Times
from ..packed import Progress, load_or_pack, read_given, write_given
from ..rows import read_rows
from ..weights import rope_tables
from . import topology
from .bandwidth import read_gb_s
from .native import load_native
from .weights import pack_weights

SPINS = 10_000  # looks at a counter before a waiter sleeps, about 0.1 ms
SPINS_OVERSUBSCRIBED = 100  # with more workers than CPUs, the one waited for may need this one's CPU


class Outcome(IntEnum):
    """What a native forward reports (csrc/kernel.h)."""

    DONE = 0
    BAD_ROW = 1
    NOT_FINITE = 2
    STALLED = 3
    FORKED = 4
    BUSY = 5


class CpuKernel(Kernel):
    """One model in packed form, its KV cache, and the team of threads that computes it.

    `keep`: weights packed now are kept in the cache. `flat` replaces the arrays that the kernel runs and `log_capacity`
    entries per worker are recorded of what it did: both are for tests. Raises LoadError for weights that cannot be
    used, DeviceError where memory or the extension is missing.
    """

    def __init__(
        self,
        checked: CheckedProgram,
        weights: Mapping[str, Tensor] | PackedWeights,
        *,
        cpus: Sequence[int] = (),
        flat: FlatProgram | None = None,
        log_capacity: int = 0,
        progress: Progress | None = None,
        keep: bool = True,
    ) -> None:
        native = load_native()
        self.program = program = checked.program
        target, memory = program.target, program.memory
        self.isa = env.isa() or native.isas()[-1]
        if self.isa not in native.isas():
            raise UnavailableError(f"FLASHFORMER_ISA={self.isa}: this CPU has {', '.join(native.isas())}")
        n_cpus = len(topology.affinity())
        self._n_threads = n_threads = min(target.n_workers, n_cpus)
        try:
            if isinstance(weights, PackedWeights):
                self._weights = read_given(native, program, weights, n_threads)
            else:
                pack = partial(pack_weights, native, program, weights, n_threads, self.isa, progress)
                self._weights = load_or_pack(native, program, weights, n_threads, pack, keep=keep)
            kv, work = native.Region(memory.kv_bytes), native.Region(memory.buffers_bytes)
        except MemoryError as error:
            raise UnavailableError(
                f"{memory.total_bytes:,} bytes of memory cannot be had: lower ctx or streams"
            ) from error
        flat = flat or flatten(program)
        for offset, table in rope_tables(program):
            work.array[offset:][: table.nbytes].view(np.float32)[:] = table.ravel()
        self.rows = rows = Rows(target)
        self._native = _start(
            native.Kernel,
            model=flat.model.view(np.uint8),
            phases=flat.phases.view(np.uint8),
            schedule=flat.schedule.reshape(-1).view(np.uint8),
            tapes=flat.tapes.view(np.uint8),
            tape_begin=flat.tape_begin,
            weights=self._weights,
            kv=kv,
            work=work,
            columns=[getattr(rows, name).view(np.uint8) for name in (*ROW_COLUMNS, *ADJUST_COLUMNS)],
            isa=self.isa,
            spins=SPINS if target.n_workers <= n_cpus else SPINS_OVERSUBSCRIBED,
            cpus=list(cpus),
            delay_seed=env.delays(),
            log_capacity=log_capacity,
            asks=env.PREFETCHES.index(env.prefetch(topology.software_prefetch())),
            keep=(self._weights, kv, work),
        )
        buffers = {b.space: b for b in memory.buffers}
        tokens, logits = buffers[Space.TOKENS], buffers[Space.LOGITS]
        self.tokens = work.array[tokens.offset :][: tokens.n_bytes].view(np.int32)
        logit_rows = work.array[logits.offset :][: logits.n_bytes].view(np.float32).reshape(MAX_HEAD_ROWS, -1)
        self.logits = logit_rows[:, : program.spec.vocab_size]
        self._forward: Callable[[int], tuple[int, int]] = self._native.forward

    def forward(self, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        outcome, detail = self._forward(n_rows)
        if outcome != Outcome.DONE:
            self._fail(Outcome(outcome), detail, n_rows)

    def _fail(self, outcome: Outcome, detail: int, n_rows: int) -> NoReturn:
        if outcome is Outcome.BAD_ROW:
            read_rows(self.rows, n_rows, self.program)
            raise AssertionError(f"the native check refused row {detail}, the Python check none")
        if outcome is Outcome.NOT_FINITE:
            raise nonfinite.at_place(self.program, detail)
        if outcome is Outcome.FORKED:
            raise DeviceError("this model was loaded before a fork: load it again in this process, or use spawn")
        if outcome is Outcome.BUSY:
            raise DeviceError("another thread is inside this kernel: forwards of one kernel must take turns")
        worker, phase, expected, seen = self._native.stall()
        raise DeviceError(
            f"worker {worker} waited in vain before phase {phase}: {expected} arrivals expected, {seen} seen. "
            "The model cannot be used any more: load it again, and report this"
        )

    def log(self, worker: int) -> list[tuple[int, int, int, int]]:
        """(phase, kind, value, begin) of what a worker did since `clear_logs`; kinds as in csrc/forward.h."""
        return list(self._native.log(worker))

    def clear_logs(self) -> None:
        self._native.clear_logs()

    def keep_times(self) -> None:
        self._native.keep_times()

    def forget_times(self) -> None:
        self._native.forget_times()

    def times(self) -> Times:
        *phases, begin, end = self._native.times()
        both = np.array(phases, np.int64).reshape(self.program.target.n_workers, -1, 2)
        run = both[0, :, 1] > 0
        return Times(begin, end, both[:, run, 0], both[:, run, 1])

    @property
    def fits_in_cache(self) -> bool:
        return topology.caches_hold(self.program.packed_bytes)

    def probe_weights(self) -> float | None:
        """GB/s at which this kernel's number of threads reads its packed weights; None where caches hold them."""
        if self.fits_in_cache:
            return None
        n_bytes = self.program.packed_bytes
        return read_gb_s(self._weights.array[:n_bytes], self.program.target.n_workers, 0.4)

    def write_weights(self, path: Path, original: str, error: Mapping[str, Any]) -> None:
        write_given(load_native(), self.program, self._weights, self._n_threads, path, original, error)

    def describe(self) -> dict[str, object]:
        return {
            "device": "cpu",
            "isa": self.isa,
            "threads": self.program.target.n_workers,
            "activations": self._activations(),
        }

    def _activations(self) -> str:
        """What meets the weights of the layers."""
        if not self._native.narrow:
            return "f32"
        return "int8" if self.program.target.body_quant else "bf16"

    def close(self) -> None:
        self._forward = _closed
        for name in ("_native", "_weights", "tokens", "logits"):
            self.__dict__.pop(name, None)


def _start(kernel: Any, **arguments: Any) -> Any:
    """The native kernel. Raises DeviceError where its memory or threads cannot be had."""
    try:
        return kernel(**arguments)
    except MemoryError as error:
        raise UnavailableError("memory for the kernel cannot be had: free some, or lower ctx or streams") from error
    except RuntimeError as error:
        raise UnavailableError(
            f"the threads of the kernel cannot be started ({error}): load with fewer threads"
        ) from error


def _closed(n_rows: int) -> NoReturn:
    raise DeviceError("the kernel is closed: load the model again")
