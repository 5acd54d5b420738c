"""Rows and forwards of a kernel, and how long they take."""

from __future__ import annotations

from contextlib import suppress
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashformer.backends.base import Kernel, Want
from flashformer.backends.cuda.kernel import FAILED, CudaKernel
from flashformer.backends.cuda.launch import error_of
from flashformer.backends.rows import read_rows

F32Array = NDArray[np.float32]
Errors = tuple[type[Exception], ...]


def ask(kernel: Kernel, row: int, ids: Any, pos: int, slot: int, want: Want = Want.LOGITS) -> None:
    """Rows from `row` on: `ids` of one slot from `pos` on, greedy."""
    rows, at = kernel.rows, slice(row, row + len(ids))
    rows.token[at], rows.slot[at], rows.want[at] = ids, slot, want
    rows.pos[at] = np.arange(pos, pos + len(ids))
    rows.temperature[at], rows.choice[at], rows.top_k[at], rows.top_p[at], rows.min_p[at] = 0, 0, 0, 1, 0
    rows.adjust_begin[at], rows.adjust_end[at] = 0, 0


def prompt_logits(
    kernel: Kernel, ids: NDArray[np.int32], cut: int, slot: int = 0, wanted: NDArray[np.int64] | None = None
) -> F32Array:
    """(positions, vocab_size) of a prompt in forwards of `cut` rows; of all its positions or those `wanted`."""
    chosen = np.arange(len(ids)) if wanted is None else wanted
    parts = []
    for begin in range(0, len(ids), cut):
        part = ids[begin : begin + cut]
        here = np.isin(np.arange(begin, begin + len(part)), chosen)
        ask(kernel, 0, part, begin, slot, Want.NOTHING)
        kernel.rows.want[: len(part)] = np.where(here, Want.LOGITS, Want.NOTHING)
        kernel.forward(len(part))
        parts.append(kernel.logits[: here.sum()].copy())
    return np.concatenate(parts)


def relative_error(found: F32Array, expected: F32Array) -> float:
    """Largest difference over the largest expected value; infinite where something is not finite."""
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return error if np.isfinite(error) else float("inf")


def run_phases(kernel: CudaKernel, n_rows: int, n_phases: int) -> None:
    """A forward of rows that are filled already, in one launch, that ends behind its first phases. Raises as `forward`
    does.
    """
    _filled(kernel, n_rows)
    kernel._launch["n_phases"] = n_phases
    kernel._start(kernel._launch)
    kernel._gpu.finish()
    _require_sound(kernel)


def device_seconds(kernel: CudaKernel, n_rows: int, launches: int, repeats: int, tolerated: Errors = ()) -> list[float]:
    """Per forward of rows that are filled already, `launches` of them queued one behind another: time on the GPU.

    Each computes the same tokens at the same positions again. Raises as `forward` does, but what is tolerated.
    """
    _filled(kernel, n_rows)

    def queue() -> None:
        for _ in range(launches):
            kernel._start(kernel._launch)

    times = [kernel._gpu.seconds(queue) / launches for _ in range(1 + repeats)][1:]
    with suppress(*tolerated):
        _require_sound(kernel)
    return times


def _filled(kernel: CudaKernel, n_rows: int) -> None:
    """The launch record of one launch, whose results are those of turn 0."""
    batch = read_rows(kernel.rows, n_rows, kernel.program)
    assert n_rows <= max(kernel._kernels)
    kernel._upload_adjustments(batch)
    kernel._results[0, FAILED] = 0
    kernel._fill(kernel._launch, batch, 0, 0)


def _require_sound(kernel: CudaKernel) -> None:
    if kernel._results[0, FAILED]:
        raise error_of(kernel.program, kernel._read_report())


def wall_seconds(kernel: Kernel, n_rows: int, repeats: int) -> float:
    """Of one call of `forward`, Python included: the median."""
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        kernel.forward(n_rows)
        times.append(perf_counter() - begin)
    return median(times)
