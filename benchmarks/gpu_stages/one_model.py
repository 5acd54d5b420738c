"""One model in one format: made on the GPU, checked, timed, traced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashformer.backends.base import Times, Want
from flashformer.backends.cuda.driver import DriverGpu
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.cuda.nvrtc import source_of
from flashformer.backends.cuda.specialize import row_counts, specialize
from flashformer.check import CheckedProgram, check
from flashformer.checkpoint.tensor import Tensor
from flashformer.program import build
from flashformer.program.ir import Program

from . import torch_model
from .decode import F32Array, ask, device_seconds, relative_error, wall_seconds
from .device import Compiler, spec_gb_s
from .models import Kind
from .record import Clock, Record, spread
from .stream import Read, Reader
from .target import ROWS, cuda_target

DEVICE = "cuda"
ALONE = 4  # tokens behind the first context that are computed one by one
REPEATS, LAUNCHES = 9, 20
MOST_ERROR = 0.1  # of the largest logit, whatever rounding does
RINGS = (Read(16384, 192 << 10), Read(32768, 192 << 10), Read(16384, 128 << 10))


class DeviceKernel(CudaKernel):
    """A CudaKernel whose packed weights are on the GPU already."""

    def __init__(self, checked: CheckedProgram, region: torch.Tensor, **options: Any) -> None:
        self._region = region
        super().__init__(checked, {}, **options)

    def _upload_weights(self, weights: Mapping[str, Tensor], n_threads: int, progress: object) -> None:
        self._launch["weights"] = self._region.data_ptr()


@dataclass
class Model:
    """`ids`: one sequence, as long as the deepest context."""

    kind: Kind
    program: Program
    kernel: DeviceKernel
    region: torch.Tensor
    ids: NDArray[np.int32]
    expected: dict[int, F32Array]  # by position: logits in fp32
    allowed: float

    @property
    def check_name(self) -> str:
        return f"{self.kind.name}: logits"


def run_kind(record: Record, clock: Clock, kind: Kind, compiler: Compiler) -> None:
    model = _made(record, kind, compiler)
    try:
        clock.require(f"logits of {kind.name}", 2)
        if not _first_logits(record, model):
            return
        ceiling = _ceiling(record, model, compiler)
        for context in kind.contexts:
            clock.require(f"{kind.name} at {context}", 2 + context / 1000)
            _at_context(record, clock, model, context, ceiling)
        if kind.trace:
            clock.require(f"trace of {kind.name}", 5)
            record.result(f"trace of {kind.name}", traced(model.kernel))
    finally:
        model.kernel.close()
        del model
        torch.cuda.empty_cache()


# ---- making and checking -------------------------------------------------------------------------------------------


def positions(kind: Kind) -> list[int]:
    """Where logits are compared: in the first forwards of 16 rows, one by one behind them, at every context."""
    first = kind.contexts[0]
    return sorted({0, 1, 7, 15, 16, first - 1, *range(first, first + ALONE), *kind.contexts})


def _made(record: Record, kind: Kind, compiler: Compiler) -> Model:
    gpu, spec = DriverGpu(), kind.spec
    try:
        target = cuda_target(gpu.info.facts.n_sm, quant=kind.quant, streams=kind.streams, ctx=kind.ctx)
        checked = check(build(spec, target))
        counts = row_counts(checked.program, gpu.info.facts)
        made = [specialize(checked, gpu.info.facts, n_rows=n, times=t) for n in counts for t in {False, kind.trace}]
        compiler.prepare(source_of(one) for one in made)
        weights = torch_model.random_weights(spec, kind.quant, DEVICE)
        ids = np.random.default_rng(0).integers(0, spec.vocab_size, max(positions(kind)) + 1).astype(np.int32)
        on_gpu, wanted = torch.from_numpy(ids).long().to(DEVICE), positions(kind)
        exact = torch_model.logits(spec, weights, on_gpu, wanted).cpu().numpy()
        rounding = torch.float16 if kind.quant else torch.bfloat16
        rounded = torch_model.logits(spec, weights, on_gpu, wanted, rounding).cpu().numpy()
        allowed = min(2 * relative_error(rounded, exact) + 1e-3, MOST_ERROR)
        region = torch_model.pack(checked.program, weights, DEVICE)
        del weights
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        expected = dict(zip(wanted, exact, strict=True))
        record.result(f"{kind.name} allowed error", {"allowed": allowed, "rounded": relative_error(rounded, exact)})
        kernel = DeviceKernel(checked, region, gpu=gpu, compiler=compiler)
    except BaseException:
        gpu.close()
        raise
    record.result(f"{kind.name} kernel", kernel.describe())
    return Model(kind, checked.program, kernel, region, ids, expected, allowed)


def _first_logits(record: Record, model: Model) -> bool:
    """Of the first context in forwards of 16 rows, and of a few tokens behind it one by one."""
    first = model.kind.contexts[0]
    errors = [_fill(model, 0, first)]
    for pos in range(first, first + ALONE):
        ask(model.kernel, 0, model.ids[pos : pos + 1], pos, 0)
        model.kernel.forward(1)
        errors.append(relative_error(model.kernel.logits[:1], model.expected[pos][None]))
    detail = f"errors up to {max(errors):.2e}, allowed {model.allowed:.2e}, {len(errors) - 1} tokens one by one"
    return record.check(model.check_name, max(errors) <= model.allowed, detail)


def _fill(model: Model, begin: int, end: int) -> float:
    """Positions [begin, end) of slot 0, 16 rows at a time; the largest error of those that are compared."""
    worst = 0.0
    for at in range(begin, end, ROWS):
        part = model.ids[at : min(at + ROWS, end)]
        ask(model.kernel, 0, part, at, 0, Want.NOTHING)
        compared = [at + i for i in range(len(part)) if at + i in model.expected]
        for pos in compared:
            model.kernel.rows.want[pos - at] = Want.LOGITS
        model.kernel.forward(len(part))
        for i, pos in enumerate(compared):
            worst = max(worst, relative_error(model.kernel.logits[i : i + 1], model.expected[pos][None]))
    return worst


# ---- speed ---------------------------------------------------------------------------------------------------------


def _ceiling(record: Record, model: Model, compiler: Compiler) -> float:
    """GB/s: the best of plain loads and of rings of bulk copies over the same packed weights."""
    reader = Reader(model.kernel._gpu, compiler, model.region.data_ptr(), model.program.packed_bytes, None)
    found = {f"ring {r.slot_bytes >> 10} KB x {r.n_slots}": reader.gb_s(r) for r in RINGS}
    if (plain := model.kernel.probe_weights()) is not None:
        found["plain loads"] = plain
    for name, value in found.items():
        record.speed(f"{model.kind.name} read: {name}", value, "GB/s", check=model.check_name)
    return max(found.values())


def weight_bytes(program: Program) -> int:
    """Of all matrices that one forward reads, without padding."""
    matrices = (phase.matrix for phase in program.phases if phase.matrix is not None)
    return sum(m.n_out * m.format.row_bytes(m.k) for m in matrices)


def kv_bytes(program: Program, kv_len: int, rows: int) -> int:
    per = sum(2 * layer.kv_width * program.target.kv_format.element_bytes for layer in program.spec.layers)
    return per * kv_len * rows


def _at_context(record: Record, clock: Clock, model: Model, context: int, ceiling: float) -> None:
    """One new token behind `context` cached ones: of slot 0, whose keys are there; the other slots hold zeros."""
    name = f"{model.kind.name}, {context} cached"
    begin = 0 if context == model.kind.contexts[0] else _before(model, context)
    worst = _fill(model, begin, context)
    ask(model.kernel, 0, model.ids[context : context + 1], context, 0)
    model.kernel.forward(1)
    alone = model.kernel.logits[:1].copy()
    worst = max(worst, relative_error(alone, model.expected[context][None]))
    if not record.check(f"{name}: logits", worst <= model.allowed, f"error {worst:.2e}, allowed {model.allowed:.2e}"):
        return
    one_row = 0.0
    for rows in model.kind.rows:
        clock.require(f"{name}, {rows} rows", 2)
        check_name = f"{name}, {rows} rows: same bits as one row"
        for row in range(rows):
            ask(model.kernel, row, model.ids[context : context + 1], context, row)
        model.kernel.forward(rows)
        same = model.kernel.logits[0].tobytes() == alone[0].tobytes()
        if not record.check(check_name, same, f"logits of slot 0 among {rows}"):
            continue
        model.kernel.rows.want[:rows] = Want.TOKEN
        one_row = _speed(record, model, name, context, rows, ceiling, check_name, one_row)


def _before(model: Model, context: int) -> int:
    """How far slot 0 is filled already, a multiple of 16."""
    return max(c for c in model.kind.contexts if c < context) // ROWS * ROWS


def _speed(
    record: Record, model: Model, name: str, context: int, rows: int, ceiling: float, check_name: str, one_row: float
) -> float:
    """us of a forward, beside its bytes and what reading them takes; the us of one row, for the next."""
    times = device_seconds(model.kernel, rows, LAUNCHES, REPEATS)
    model.kernel.forward(rows)
    tokens = model.kernel.tokens[:rows].copy()
    model.kernel.forward(rows)
    record.check(check_name, bool((tokens == model.kernel.tokens[:rows]).all()), "the same tokens again")
    us, n_weights = median(times) * 1e6, weight_bytes(model.program)
    n_bytes = n_weights + kv_bytes(model.program, context + 1, rows)
    gb_s = n_bytes / us / 1e3
    spec = spec_gb_s(model.kernel._gpu.info.facts.name)
    record.speed(
        f"{name}, {rows} rows", us, "us", check=check_name, shown=rows in (model.kind.rows[0], model.kind.rows[-1]),
        us=spread([t * 1e6 for t in times]), wall_us=wall_seconds(model.kernel, rows, 50) * 1e6,
        tokens_per_s=rows / us * 1e6, weight_bytes=n_weights, bytes=n_bytes, gb_s=gb_s, ceiling_gb_s=ceiling,
        of_ceiling=gb_s / ceiling, of_spec=gb_s / spec if spec else None, of_one_row=us / one_row if one_row else None,
    )  # fmt: skip
    if rows == model.kind.rows[0]:
        percent = 100 * gb_s / ceiling
        record.speed(f"{name}, {rows} rows: of the ceiling", percent, "%", check=check_name, shown=True)
        return us
    return one_row


# ---- trace ---------------------------------------------------------------------------------------------------------


def traced(kernel: CudaKernel) -> dict[str, Any]:
    """The fastest of a few forwards of the row that is there: us per kind of phase, over its layers."""
    kernel.keep_times()
    best: Times | None = None
    for _ in range(12):
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
