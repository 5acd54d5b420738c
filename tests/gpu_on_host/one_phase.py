"""One phase of a real Program on the simulated GPU, alone: its buffers filled by the test, a launch per forward."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_on_host.build import build
from gpu_on_host.simulator import Simulator, aligned
from numpy.typing import NDArray

from flashformer.backends.cuda.launch import LAUNCH
from flashformer.backends.cuda.specialize import DeviceFacts, Specialization, specialize
from flashformer.check import CheckedProgram
from flashformer.model.rope import rope_table
from flashformer.program import Program
from flashformer.program.ir import MAX_HEAD_ROWS, Op, Space
from flashformer.program.memory import rope_offsets
from flashformer.program.records import FlatProgram, flatten, rope_begin

CONSUMERS = 256
SHARED_BYTES = 232448  # of a block, as a device has them

# launch.base says which phase; nothing is loaded, nobody waits for another phase.
MAIN = """#include "ptx.h"
#include "attend.cuh"
#include "embed.cuh"
#include "sample.cuh"
#include "tokens.cuh"

using namespace flashformer;

extern "C" void ff_thread(const void* argument, u32 smem) {
  const Launch& launch = *static_cast<const Launch*>(argument);
  Context ctx = {launch, *launch.model, smem, thread_index(), warp_index(), lane_index(), block_index()};
  const Phase& phase = launch.phases[launch.base];
  const Span& span = launch.schedule[launch.base * kWorkers + block_index()];
  const Op op = static_cast<Op>(phase.op);
  if (op == Op::kAttend && ctx.thread == 0) attend_ahead(launch, phase, span);
  if (ctx.warp == 0) copy_tokens(launch, smem, ctx.lane);
  bar_sync(Site::kInitBar, 0, kConsumers);
  op == Op::kEmbed ? embed(ctx, phase, span) : op == Op::kSample ? sample(ctx, phase, span) : attend(ctx, phase, span);
}
"""


@dataclass(frozen=True)
class Group:
    """Rows of one slot: `n` of them from position `pos` on."""

    slot: int
    pos: int
    n: int


class OnePhase:
    """`op`'s first phase of `program`. Buffers are views of what the kernel sees; NaN where nothing was written."""

    def __init__(self, program: Program, op: Op, *, n_rows: int = 8, **options: int):
        self.program, self.flat = program, flatten(program)
        self.index = next(i for i, phase in enumerate(program.phases) if phase.op is op)
        self.spec = _specialization(program, n_rows)
        self.simulator = Simulator(
            build(self.spec.header(), [], MAIN), program.target.n_workers, self.spec.shared_bytes, CONSUMERS, **options
        )
        memory = program.memory
        self.weights = aligned(memory.weights_bytes, np.uint8)
        self.kv = aligned(memory.kv_bytes, np.uint8)
        self._work = aligned(rope_begin(program), np.uint8)
        self._arena = aligned(memory.buffers_bytes, np.uint8)  # work, then rope tables
        self._work = self._arena[: rope_begin(program)]
        self.adjust = {
            name: aligned(4096, dtype)
            for name, dtype in (
                ("token", np.int32),
                ("penalty", np.float32),
                ("bias", np.float32),
                ("kept", np.float32),
            )
        }
        self.results = aligned(MAX_HEAD_ROWS, np.int32)
        self.launch = np.zeros(1, LAUNCH)
        self.launch["base"], self.launch["top_p"] = self.index, 1
        for buffer in memory.buffers:
            if buffer.space is not Space.MERGES:
                self._work[buffer.offset : buffer.offset + buffer.n_bytes] = 0xFF  # NaN as a float
        self._register(self.flat)

    def _register(self, flat: FlatProgram) -> None:
        simulator, launch = self.simulator, self.launch[0]
        begin = rope_begin(self.program)
        for rope, offset in rope_offsets(self.program.spec, self.program.target.ctx)[0].items():
            table = rope_table(rope, self.program.target.ctx).astype(np.float32)
            self._arena[begin + offset :][: table.nbytes] = table.reshape(-1).view(np.uint8)
        if begin < len(self._arena):
            simulator.constant(self._arena[begin:], "rope")
        launch["work"] = simulator.mutable(self._work, "work")
        launch["kv"] = simulator.mutable(self.kv, "kv")
        launch["weights"] = simulator.constant(self.weights, "weights")
        self._records = [np.ascontiguousarray(getattr(flat, name)) for name in ("model", "phases", "schedule")]
        for name, records in zip(("model", "phases", "schedule"), self._records, strict=True):
            launch[name] = simulator.constant(records, name)
        launch["results"] = simulator.mutable(self.results, "results")
        for name, array in self.adjust.items():
            put = simulator.mutable if name == "kept" else simulator.constant
            launch[f"adjust_{name}"] = put(array, name)

    @property
    def phase(self) -> np.void:
        """The phase's record, which the kernel reads: a test may change it."""
        return self._records[1][self.index]  # type: ignore[no-any-return]

    def buffer(self, space: Space, dtype: Any = np.float32) -> NDArray[Any]:
        """(shape) of a buffer between phases."""
        found = next(b for b in self.program.memory.buffers if b.space is space)
        flat: NDArray[Any] = self._work[found.offset : found.offset + found.n_bytes].view(dtype)
        return flat.reshape(found.shape) if flat.size == np.prod(found.shape) else flat

    def run(self, groups: list[Group] | None = None) -> str:
        """One launch over the rows of `groups`, or over those that the launch record has. The finding, or nothing."""
        if groups is not None:
            set_groups(self.launch[0], groups)
        return self.simulator.run(_Argument.from_address(self.launch.ctypes.data))


class _Argument(ctypes.Structure):
    """A launch record as ctypes passes it."""

    _fields_ = [("bytes", ctypes.c_char * LAUNCH.itemsize)]


def set_groups(launch: np.void, groups: list[Group]) -> None:
    row = 0
    for g, group in enumerate(groups):
        launch["group_slot"][g], launch["group_pos"][g] = group.slot, group.pos
        launch["group_begin"][g], launch["group_end"][g] = row, row + group.n
        launch["slot"][row : row + group.n] = group.slot
        launch["pos"][row : row + group.n] = np.arange(group.pos, group.pos + group.n)
        row += group.n
    launch["n_rows"], launch["n_groups"] = row, len(groups)


def _specialization(program: Program, n_rows: int) -> Specialization:
    facts = DeviceFacts("simulated", program.target.n_workers, SHARED_BYTES, (9, 0))
    return specialize(CheckedProgram(program, {}), facts, n_rows=n_rows)
