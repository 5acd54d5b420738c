"""The CUDA kernel: one cooperative launch per forward, of a kernel compiled for this Program and this GPU.

A forward of more rows than the largest kernel takes, on GPUs with little shared memory, is several launches: its rows
in their order, so that a later launch finds the keys and values of the earlier ones.

Where the caller says that it will run the same rows again, their next launch is queued behind the present one before
that has ended: it finds the tokens in the memory of the GPU, and does nothing if one of them is a stop token. So the
GPU does not wait for Python between two tokens. If another forward is asked for instead, what the queued one computed
is left where it is, in positions that nobody counts on.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...check import CheckedProgram
from ...checkpoint.tensor import Tensor
from ...errors import DeviceError
from ...program.ir import MAX_HEAD_ROWS, Buffer, Space
from ...program.records import flatten
from ..base import ADJUST_COLUMNS, ROW_COLUMNS, Kernel, Rows, Times, Want
from ..packed import Progress, load_or_pack
from ..rows import Batch, read_rows
from ..weights import rope_tables
from .cache import cubin_of
from .driver import DriverGpu, Gpu
from .host import extension, host_memory
from .launch import LAUNCH, REPORT_WORDS, error_of, fill, parts, shifted
from .nvrtc import ENTRY, Source, resources, source_of, version
from .pack import pack_weights
from .probe import LEAST_BYTES, probe_gb_s
from .specialize import MAX_ROWS, THREADS, Specialization, row_counts, specialize

SPIN_CYCLES = 3_000_000_000  # that a wait may take: about 1.5 s
UPLOAD_BYTES = 64 << 20  # between two reports of progress

TURNS = 2  # forwards under way at most
FAILED = MAX_HEAD_ROWS  # behind the tokens in the results of a forward

Compile = Callable[[Source], bytes]


@dataclass(frozen=True)
class _Queued:
    """A forward under way."""

    launch: NDArray[np.void]  # the record, of the first launch if it is several
    turn: int  # which event and which results are its own
    n_tokens: int


class CudaKernel(Kernel):
    """One model in the memory of a GPU: weights, KV cache, buffers, and a kernel for each of `row_counts`.

    `base` is the first number of arrivals, modulo 2^32, `spin_cycles` what a wait may take; `gpu` and `compiler` can be
    replaced: all for tests. Raises LoadError for weights that cannot be used, DeviceError where the GPU, its driver
    or NVRTC is missing or lacks something.
    """

    def __init__(
        self,
        checked: CheckedProgram,
        weights: Mapping[str, Tensor],
        *,
        gpu: Gpu | None = None,
        compiler: Compile = cubin_of,
        base: int = 0,
        spin_cycles: int = SPIN_CYCLES,
        n_threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self.program = checked.program
        self._opened = ExitStack()  # gives back what was taken, last first
        self._pid = os.getpid()
        self._end = weakref.finalize(self, _give_back, self._opened, self._pid)
        self._base = base  # of the next launch
        self._launch_phases = 0  # of the last launch
        self._next: _Queued | None = None  # before it was asked for
        self._registers = 0
        self._compiler = compiler
        self._checked = checked
        try:
            self._gpu = gpu if gpu is not None else DriverGpu()
            self._opened.callback(self._gpu.close)
            self._kernels = self._plain = self._load(times=False)
            self._timed: dict[int, tuple[Specialization, Any]] = {}
            self._launch = np.zeros(1, LAUNCH)
            self._launch["spin_limit"] = spin_cycles
            self._make_rows()
            self._upload_weights(weights, n_threads, progress)
            self._upload_program()
            self._make_results()
            self._gpu.finish()
        except BaseException:
            self.close()
            raise

    # ---- loading

    def _load(self, *, times: bool) -> dict[int, tuple[Specialization, Any]]:
        """By the rows that a kernel takes at most; compiled side by side."""
        facts = self._gpu.info.facts
        counts = row_counts(self.program, facts)
        made = [specialize(self._checked, facts, n_rows=n, times=times) for n in counts]
        with ThreadPoolExecutor(len(made)) as pool:
            cubins = list(pool.map(lambda one: self._compiler(source_of(one)), made))
        kernels = {}
        for one, cubin in zip(made, cubins, strict=True):
            handle = self._gpu.load(cubin, ENTRY, one.n_workers, THREADS, one.shared_bytes)
            self._opened.callback(self._gpu.unload, handle)
            kernels[one.n_rows] = one, handle
        with suppress(ValueError):  # cubins of tests
            self._registers = max(resources(cubin).registers for cubin in cubins)
        return kernels

    def _allocate(self, name: str, n_bytes: int) -> int:
        """Zeroed memory that the launch record knows as `name`."""
        address = self._gpu.allocate(n_bytes)
        self._opened.callback(self._gpu.free, address)
        self._gpu.zero(address, n_bytes)
        if name in (LAUNCH.names or ()):
            self._launch[name] = address
        return address

    def _store(self, name: str, data: NDArray[Any]) -> None:
        """A copy of `data`, which lives until the next `finish`."""
        self._gpu.write(self._allocate(name, data.nbytes), data)

    def _pinned(self, n_elements: int, dtype: Any) -> NDArray[Any]:
        memory = self._gpu.pinned(n_elements * np.dtype(dtype).itemsize)
        self._opened.callback(self._gpu.unpin, memory)
        memory[:] = 0
        return memory.view(dtype)

    def _make_rows(self) -> None:
        """The row columns are those of the launch record itself."""
        self.rows = Rows(self.program.target)
        for name in ROW_COLUMNS:
            setattr(self.rows, name, self._launch[name][0])
        self.rows.top_p[:] = 1
        for name in ADJUST_COLUMNS:
            self._allocate(name, getattr(self.rows, name).nbytes)

    def _upload_weights(self, weights: Mapping[str, Tensor], n_threads: int, progress: Progress | None) -> None:
        program = self.program
        region = load_or_pack(
            host_memory(),
            program,
            weights,
            n_threads,
            lambda made: pack_weights(made.array, program, weights, n_threads, progress, native=extension()),
        )
        packed = region.array[: program.memory.weights_bytes]
        address = self._allocate("weights", len(packed))
        for begin in range(0, len(packed), UPLOAD_BYTES):
            part = packed[begin : begin + UPLOAD_BYTES]
            self._gpu.write(address + begin, part)
            self._gpu.finish()
            if progress is not None:
                progress("copying to the GPU", begin + len(part), len(packed))

    def _upload_program(self) -> None:
        program, flat = self.program, flatten(self.program)
        for name in ("model", "phases", "schedule", "tapes", "tape_begin"):
            self._store(name, getattr(flat, name))
        self._allocate("kv", program.memory.kv_bytes)
        work = self._allocate("work", program.memory.buffers_bytes)
        tables = rope_tables(program)
        for offset, table in tables:
            self._gpu.write(work + offset, table)
        self._counter = self._allocate("counter", 4)
        if spilled := max(one.accumulator_bytes for one, _ in self._kernels.values()):
            self._allocate("accumulators", spilled)
        base = np.array([self._base], np.uint32)
        self._gpu.write(self._counter, base)
        self._gpu.finish()  # until here what was written must live

    def _make_results(self) -> None:
        target, work = self.program.target, int(self._launch["work"][0])
        buffers: dict[Space, Buffer] = {b.space: b for b in self.program.memory.buffers}
        self._merges = work + buffers[Space.MERGES].offset, buffers[Space.MERGES].n_bytes
        self._logits_at = work + buffers[Space.LOGITS].offset
        self._logits_stride = buffers[Space.LOGITS].shape[1]
        self._report = self._pinned(REPORT_WORDS + target.n_workers, np.uint32)
        self._report_at = self._allocate("report", self._report.nbytes)
        self._results = self._pinned(TURNS * 2 * MAX_HEAD_ROWS, np.int32).reshape(TURNS, -1)
        self.tokens = np.zeros(MAX_HEAD_ROWS, np.int32)
        self._all_logits = self._pinned(MAX_HEAD_ROWS * self._logits_stride, np.float32).reshape(MAX_HEAD_ROWS, -1)
        self.logits = self._all_logits[:, : self.program.spec.vocab_size]

    # ---- running

    def forward(self, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        if self._pid != os.getpid():
            raise DeviceError("this model was loaded before a fork: load it again in this process, or use spawn")
        if not self._kernels:
            raise DeviceError("the kernel is closed: load the model again")
        batch = read_rows(self.rows, n_rows, self.program)
        now, self._next = self._next, None
        if now is not None and not self._is(now, n_rows):
            self._leave(now)
            now = None
        if now is None:
            now = self._queue(batch)
        if again is not None and self._may_queue(batch, again):
            self._next = self._queue_again(batch, again, 1 - now.turn)
        self._gpu.wait(now.turn)
        results = self._results[now.turn]
        if results[FAILED]:
            raise error_of(self.program, self._read_report())
        self.tokens[: now.n_tokens] = results[: now.n_tokens]
        if self._next is not None and not set(again or ()).isdisjoint(results[: now.n_tokens].tolist()):
            self._base, self._next = int(self._next.launch["base"][0]), None  # it found that too, and did nothing

    def _queue(self, batch: Batch) -> _Queued:
        """The forward of `batch`, whose rows are in the launch record, while no other is under way."""
        self._upload_adjustments(batch)
        turn = 0
        first = 0  # of the results
        self._results[turn, FAILED] = 0
        for begin, part in parts(batch, max(self._kernels)):
            launch = self._launch if begin == 0 else shifted(self._launch, begin, part.n_rows)
            self._fill(launch, part, turn, first)
            self._start(launch)
            self._read_logits(part, begin, first)
            first += len(part.head_rows)
        self._gpu.mark(turn)
        return _Queued(self._launch, turn, first)

    def _fill(self, launch: NDArray[np.void], batch: Batch, turn: int, first: int) -> None:
        """What `batch` says besides the columns of its rows; its results are those from `first` on."""
        fill(launch, batch)
        launch["n_phases"] = len(self.program.phases) if batch.head_rows else self.program.head_begin
        launch["results"] = self._results[turn, first:].ctypes.data
        launch["failed"] = self._results[turn, FAILED:].ctypes.data

    def _start(self, launch: NDArray[np.void]) -> None:
        launch["base"] = self._base
        self._launch_phases = int(launch["n_phases"][0])
        self._gpu.launch(self._kernel_for(int(launch["n_rows"][0])), launch)
        self._base = (self._base + self.program.final_wait(self._launch_phases)) % 2**32

    def _may_queue(self, batch: Batch, again: tuple[int, ...]) -> bool:
        """Whether the next forward of these rows can be queued now: one launch that needs nothing from the host."""
        rows, n = self.rows, batch.n_rows
        return (
            n <= max(self._kernels)
            and len(again) <= MAX_ROWS
            and self._kernels is not self._timed
            and bool((rows.want[:n] == Want.TOKEN).all())
            and not (rows.adjust_begin[:n] < rows.adjust_end[:n]).any()
            and int(rows.pos[:n].max()) + 1 < self.program.target.ctx
        )

    def _queue_again(self, batch: Batch, again: tuple[int, ...], turn: int) -> _Queued:
        launch, n = self._launch.copy(), batch.n_rows
        self._results[turn, FAILED] = 0
        self._fill(launch, batch, turn, 0)
        launch["token"][0, :n] = -1 - np.arange(n)
        for name in ("pos", "group_pos"):
            launch[name] += 1
        launch["stops"][0, : len(again)], launch["n_stops"] = again, len(again)
        self._start(launch)
        self._gpu.mark(turn)
        return _Queued(launch, turn, n)

    def _is(self, queued: _Queued, n_rows: int) -> bool:
        """Whether a forward that was queued ahead is that of the present rows."""
        if queued.n_tokens != n_rows or not np.array_equal(self.rows.token[:n_rows], self.tokens[:n_rows]):
            return False
        columns = (name for name in ROW_COLUMNS if name != "token")
        return all(np.array_equal(self._launch[c][0, :n_rows], queued.launch[c][0, :n_rows]) for c in columns)

    def _leave(self, queued: _Queued) -> None:
        """Waits for a forward that nobody wants any more."""
        self._gpu.wait(queued.turn)
        if self._results[queued.turn, FAILED]:
            self._read_report()

    def _kernel_for(self, n_rows: int) -> Any:
        """What a GPU launches: the kernel for as few rows as will do."""
        return self._kernels[min(n for n in self._kernels if n_rows <= n)][1]

    def _upload_adjustments(self, batch: Batch) -> None:
        rows = self.rows
        adjusted = [r for r in batch.head_rows if rows.adjust_begin[r] < rows.adjust_end[r]]
        if adjusted:
            end = int(rows.adjust_end[adjusted[-1]])  # those of a row lie behind those of the rows before
            for name in ("adjust_token", "adjust_penalty", "adjust_bias"):
                self._gpu.write(int(self._launch[name][0]), getattr(rows, name)[:end])

    def _read_logits(self, batch: Batch, begin: int, first: int) -> None:
        """Of the launch of a part that begins at row `begin`, whose results are those from `first` on."""
        wanted = [i for i, row in enumerate(batch.head_rows) if self.rows.want[begin + row] == Want.LOGITS]
        if wanted:
            part = self._all_logits[first + wanted[0] : first + wanted[-1] + 1]
            self._gpu.read(part, self._logits_at + wanted[0] * 4 * self._logits_stride)

    def _read_report(self) -> list[int]:
        """Of what went wrong; afterwards the kernel is as if nothing had."""
        self._gpu.read(self._report, self._report_at)
        self._gpu.finish()
        self._next = None
        self._gpu.zero(self._report_at, self._report.nbytes)
        self._gpu.zero(self._counter, 4)  # arrivals and merges of an aborted launch were not counted to the end
        self._gpu.zero(*self._merges)
        self._base = 0
        self._gpu.finish()
        return [int(word) for word in self._report]

    # ---- looking at it

    def keep_times(self) -> None:
        if not self._timed:
            kernels = self._load(times=True)
            n_phases = len(self.program.phases)
            self._times = self._pinned(self.program.target.n_workers * n_phases * 2, np.uint64)
            self._times_at = self._allocate("times", self._times.nbytes)
            self._timed = kernels
        self._kernels = self._timed

    def forget_times(self) -> None:
        self._kernels = self._plain

    def times(self) -> Times:
        """Of the last launch, in ns of the GPU's clock; it begins when the first block enters its first phase."""
        if self._kernels is not self._timed:
            return super().times()
        self._gpu.read(self._times, self._times_at)
        self._gpu.finish()
        shape = (self.program.target.n_workers, len(self.program.phases), 2)
        both = self._times.reshape(shape)[:, : self._launch_phases].astype(np.int64)
        return Times(int(both[:, 0, 0].min()), int(both[:, -1, 1].max()), both[..., 0], both[..., 1])

    @property
    def fits_in_cache(self) -> bool:
        return self.program.packed_bytes < LEAST_BYTES

    def probe_weights(self) -> float | None:
        """GB/s at which plain loads read the packed weights on all multiprocessors; None where caches hold them."""
        return probe_gb_s(self._gpu, int(self._launch["weights"][0]), self.program.packed_bytes, self._compiler)

    def describe(self) -> dict[str, object]:
        info = self._gpu.info
        body = self.program.target.body_format
        return {
            "device": "cuda",
            "isa": info.facts.arch,
            "threads": self.program.target.n_workers,
            "activations": "bf16" if body.name == "bf16" else "f16",
            "gpu": info.facts.name,
            "gpu_uuid": info.uuid,
            "driver": info.driver,
            "nvrtc": version(),
            "registers": self._registers,
            "ring_slots": {n: one.n_slots for n, (one, _) in self._kernels.items()},
        }

    def close(self) -> None:
        self._kernels = {}
        for name in ("logits", "_all_logits", "_report", "_results", "_times"):  # views of memory that goes
            self.__dict__.pop(name, None)
        self._end()


def _give_back(opened: ExitStack, pid: int) -> None:
    """A forked child has nothing to give back, nor has a context that was lost."""
    if pid == os.getpid():
        with suppress(DeviceError):
            opened.close()
