"""Executes a Program task by task, the workers in a random order that its waits allow."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...check import CheckedProgram
from ...errors import DeviceError
from ...program.ir import MAX_HEAD_ROWS
from ..base import Kernel, Rows, Want
from ..rows import read_rows
from .handoffs import HandOffs
from .ops import OPS
from .state import State, StoredTensor, Weights


class ReferenceKernel(Kernel):
    """Slow and obvious. `seed` chooses the interleavings; the results must not depend on it."""

    def __init__(self, checked: CheckedProgram, weights: Mapping[str, StoredTensor], seed: int = 0) -> None:
        """`weights`: tensors by role, matrices (n_out, k) in any stored format."""
        self.program = checked.program
        self.rows = Rows(self.program.target)
        self.tokens = np.full(MAX_HEAD_ROWS, -1, np.int32)
        self.logits = np.full((MAX_HEAD_ROWS, self.program.spec.vocab_size), np.nan, np.float32)
        self._rng = np.random.default_rng(seed)
        self._hand_offs = HandOffs(self.program)
        self._state: State | None = State(self.program, Weights(self.program, weights), self.rows)

    def forward(self, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        """See Kernel. AssertionError: the Program lacks a hand-off, which `check` should have found."""
        if self._state is None:
            raise DeviceError("the kernel is closed: load the model again")
        batch = read_rows(self.rows, n_rows, self.program)
        self._state.begin(batch)
        self._hand_offs.begin()
        n_phases = len(self.program.phases) if batch.head_rows else self.program.head_begin
        with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are looked for by the ops
            self._run(n_phases, self._state)
        self.tokens[:] = self._state.tokens
        self.logits[:] = np.nan
        for i, row in enumerate(batch.head_rows):
            if self.rows.want[row] == Want.LOGITS:
                self.logits[i] = self._state.logits[i]

    def _run(self, n_phases: int, state: State) -> None:
        phases, workers = self.program.phases[:n_phases], range(self.program.target.n_workers)
        done = [0] * len(workers)  # phases finished by each worker
        arrived = 0
        while arrived < self.program.final_wait(n_phases):
            ready = [w for w in workers if done[w] < n_phases and phases[done[w]].waits[w] <= arrived]
            assert ready, f"all workers wait at {arrived} arrivals, after {done} phases each"
            worker = ready[self._rng.integers(len(ready))]
            index = done[worker]
            self._hand_offs.check_reads(index, worker)
            OPS[phases[index].op](state, phases[index], worker)
            self._hand_offs.note_writes(index, worker)
            done[worker] += 1
            arrived += 1

    def describe(self) -> dict[str, object]:
        return {"device": "reference", "isa": "numpy", "threads": self.program.target.n_workers}

    def close(self) -> None:
        self._state = None
