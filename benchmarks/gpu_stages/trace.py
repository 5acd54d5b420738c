"""Where the time of a forward goes, by phase; and of one that waited in vain, where its blocks were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from flashformer.backends.base import Times
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.errors import DeviceError, NumericalError
from flashformer.program.ir import Program

from .decode import Errors
from .device import failing, is_lost
from .record import Record
from .watch import context_lost, watch

RUNS = 12
TRACED_HANGS = 2  # of a stage at most: each takes a wait to its limit


def traced(kernel: CudaKernel, tolerated: Errors = ()) -> dict[str, Any]:
    """The fastest of a few forwards of the row that is there: us per kind of phase, over its layers.

    Raises as `forward` does, but what is tolerated.
    """
    kernel.keep_times()
    best: Times | None = None
    for _ in range(RUNS):
        with suppress(*tolerated):
            kernel.forward(1)
        times = kernel.times()
        if best is None or times.end - times.begin < best.end - best.begin:
            best = times
    assert best is not None
    return phase_table(kernel.program, best)


def phase_table(program: Program, times: Times) -> dict[str, Any]:
    """Of each op: how often it runs, and in us, summed over the layers: `wait` and `busy` are means over blocks,
    `slowest` the most that a block was busy, `step` what the op adds until the last block leaves it.
    """
    entered, left = times.entered.astype(np.int64), times.left.astype(np.int64)
    before = np.concatenate([np.full((len(left), 1), times.begin), left[:, :-1]], axis=1)
    last = np.concatenate([[times.begin], left.max(axis=0)])
    sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for p in range(entered.shape[1]):
        row = sums[program.phases[p].op.value]
        busy = left[:, p] - entered[:, p]
        row["times"] += 1
        row["wait_us"] += float((entered[:, p] - before[:, p]).mean()) / 1e3
        row["busy_us"] += float(busy.mean()) / 1e3
        row["slowest_us"] += float(busy.max()) / 1e3
        row["step_us"] += float(last[p + 1] - last[p]) / 1e3
    return {"forward_us": (times.end - times.begin) / 1e3, "ops": {op: dict(row) for op, row in sums.items()}}


@contextmanager
def tracing_hangs(record: Record, name: str, kernel: CudaKernel) -> Iterator[None]:
    """Of a wait in vain inside, the results say where blocks were, before it goes on as the error that it is."""
    try:
        yield
    except DeviceError as error:
        trace_hang(record, name, kernel, error)
        raise


def trace_hang(record: Record, name: str, kernel: CudaKernel, error: DeviceError) -> None:
    """After a wait in vain: the same forward once more, by a kernel that notes times. Raises where that loses the
    context; what else goes wrong is a failed check.
    """
    done = [result for result in record.document()["results"] if result.startswith("stuck in ")]
    if context_lost() or "waited in vain" not in str(error) or len(done) >= TRACED_HANGS:
        return
    what = f"{name}: once more with times, after a wait in vain"
    record.now(what)
    with failing(record, what):
        kernel.keep_times()
        watch(kernel)
        kernel._gpu.zero(kernel._times_at, kernel._times.nbytes)
        try:
            kernel.forward(int(kernel._launch["n_rows"][0]))
        except (DeviceError, NumericalError) as again:
            if is_lost(again):
                raise
        record.result(f"stuck in {name}", stuck(kernel.program, kernel.times()))
        kernel.forget_times()


def stuck(program: Program, times: Times) -> list[dict[str, Any]]:
    """Of each block the longest time that it waited for a phase, the one behind the phase that it left last, or was in
    one: after a wait in vain blocks walk through all phases, so that the longest time is where they were until then.
    """
    before = np.concatenate([np.full((len(times.left), 1), times.begin), times.left[:, :-1]], axis=1)
    found = []
    for block in range(len(times.left)):
        spans = {"waits for": times.entered[block] - before[block], "is in": times.left[block] - times.entered[block]}
        how = max(spans, key=lambda name: spans[name].max())
        index = int(spans[how].argmax())
        phase = program.phases[index]
        found.append(
            {"block": block, "how": how, "phase": index, "op": phase.op.value, "layer": phase.layer,
             "ms": float(spans[how][index]) / 1e6}
        )  # fmt: skip
    return found
