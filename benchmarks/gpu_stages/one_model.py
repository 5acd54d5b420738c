"""One model in one format: made on the GPU, checked, timed, traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashformer.backends.base import Want
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.check import CheckedProgram
from flashformer.checkpoint.tensor import Tensor
from flashformer.errors import DeviceError, FlashformerError, NumericalError
from flashformer.program.ir import Program

from . import torch_model
from .compare import Comparison, compare
from .decode import F32Array, ask, device_seconds, relative_error, wall_seconds
from .device import Compiler, failing, spec_gb_s
from .models import Kind
from .record import Clock, Record, spread
from .stream import Read, Reader
from .target import ROWS
from .trace import traced, tracing_hangs
from .watch import WatchedGpu, context_lost, watch

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
        """Of the logits of one row; those of 16 rows have a check of their own."""
        return f"{self.kind.name}: logits of one row"

    def compare(self, row: int, pos: int) -> Comparison:
        """Of the last forward."""
        return compare(self.kernel.logits[row : row + 1].copy(), self.expected[pos][None], [pos], self.allowed)


def run_kind(record: Record, clock: Clock, kind: Kind, compiler: Compiler) -> None:
    record.now(f"making {kind.name}")
    model = _made(record, kind, compiler)
    watch(model.kernel)
    try:
        clock.require(f"logits of {kind.name}", 2)
        with tracing_hangs(record, kind.name, model.kernel):
            _run_model(record, clock, model, compiler)
    finally:
        model.kernel.close()
        del model
        if not context_lost():
            torch.cuda.empty_cache()


def _run_model(record: Record, clock: Clock, model: Model, compiler: Compiler) -> None:
    kind = model.kind
    right = _first_logits(record, model)
    record.now(f"what reading takes, {kind.name}")
    ceilings = _ceilings(record, model, compiler)
    if not right:
        _unchecked(record, model, kind.name, ceilings)
        return
    for name, value in ceilings.items():
        record.speed(f"{kind.name} read: {name}", value, "GB/s", check=model.check_name)
    for context in kind.contexts:
        clock.require(f"{kind.name} at {context}", 2 + context / 1000)
        _at_context(record, clock, model, context, max(ceilings.values()))
    if kind.trace:
        name = f"trace of {kind.name}"
        clock.require(name, 5)
        record.now(name)
        with failing(record, name, NumericalError):
            record.result(name, traced(model.kernel))


def _unchecked(record: Record, model: Model, name: str, read_gb_s: dict[str, float]) -> None:
    """Of one row where logits are wrong, NaN too: what it would take if it were right, which is no speed."""
    name = f"UNCHECKED {name}"
    record.now(name)
    model.kernel.rows.want[0] = Want.TOKEN
    tolerated = (NumericalError,)
    us = [t * 1e6 for t in device_seconds(model.kernel, 1, LAUNCHES, REPEATS, tolerated)]
    n_bytes = weight_bytes(model.program)
    found = {"us": spread(us), "weight_bytes": n_bytes, "gb_s": n_bytes / median(us) / 1e3, "read_gb_s": read_gb_s}
    record.result(name, found | ({"trace": traced(model.kernel, tolerated)} if model.kind.trace else {}))
    model.kernel.forget_times()


# ---- making and checking -------------------------------------------------------------------------------------------


def positions(kind: Kind) -> list[int]:
    """Where logits are compared: in the first forwards of 16 rows, one by one behind them, at every context."""
    first = kind.contexts[0]
    return sorted({0, 1, 7, 15, 16, first - 1, *range(first, first + ALONE), *kind.contexts})


def _made(record: Record, kind: Kind, compiler: Compiler) -> Model:
    gpu, spec = WatchedGpu(), kind.spec
    try:
        checked = kind.checked(gpu.info.facts)
        compiler.prepare(kind.kernels(checked, gpu.info.facts))
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
    """Of the first context in forwards of 16 rows, and of a few tokens behind it one by one: two checks.

    Where the first fails, forwards of one row compute the context anew, so that theirs does not fail with it.
    """
    first = model.kind.contexts[0]
    right = _right(record, model, f"{model.kind.name}: logits of {ROWS} rows", (0, first, ROWS))
    return _right(record, model, model.check_name, (first if right else 0, first + ALONE, 1)) and right


def _right(record: Record, model: Model, name: str, *parts: tuple[int, int, int]) -> bool:
    """The check of that name, of positions (begin, end, rows at a time); with all that is known of wrong ones."""
    record.now(name)
    with failing(record, name, FlashformerError):
        with tracing_hangs(record, name, model.kernel):
            found = [one for part in parts for one in _fill(model, *part)]
        worst = max(found, key=lambda one: one.error)
        detail = f"{worst.text}, allowed {model.allowed:.2e}, {len(found)} positions"
        if record.check(name, worst.error <= model.allowed, detail):
            return True
        record.result(name, [one.facts() for one in found])
    return False


def _fill(model: Model, begin: int, end: int, rows: int) -> list[Comparison]:
    """Positions [begin, end) of slot 0, so many rows at a time; of each that is compared, how it does."""
    found = []
    for at in range(begin, end, rows):
        part = model.ids[at : min(at + rows, end)]
        ask(model.kernel, 0, part, at, 0, Want.NOTHING)
        compared = [at + i for i in range(len(part)) if at + i in model.expected]
        for pos in compared:
            model.kernel.rows.want[pos - at] = Want.LOGITS
        model.kernel.forward(len(part))
        found += [model.compare(i, pos) for i, pos in enumerate(compared)]
    return found


# ---- speed ---------------------------------------------------------------------------------------------------------


def _ceilings(record: Record, model: Model, compiler: Compiler) -> dict[str, float]:
    """GB/s of plain loads and of rings of bulk copies over the same packed weights; the best is the ceiling.

    A ring that is wrong has a failed check.
    """
    reader = Reader(model.kernel._gpu, compiler, model.region.data_ptr(), model.program.packed_bytes, None)
    found = {}
    for read in RINGS:
        name = f"ring {read.slot_bytes >> 10} KB x {read.n_slots}"
        with failing(record, f"{model.kind.name} read: {name}", DeviceError):
            found[name] = reader.gb_s(read)
    if (plain := model.kernel.probe_weights()) is not None:
        found["plain loads"] = plain
    return found


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
    if not _right(record, model, f"{name}: logits", (begin, context, ROWS), (context, context + 1, 1)):
        _unchecked(record, model, name, {"best": ceiling})
        return
    alone, one_row = model.kernel.logits[:1].copy(), 0.0
    for rows in model.kind.rows:
        clock.require(f"{name}, {rows} rows", 2)
        record.now(f"{name}, {rows} rows")
        check_name = f"{name}, {rows} rows: same bits as one row"
        with failing(record, check_name, NumericalError):
            for row in range(rows):
                ask(model.kernel, row, model.ids[context : context + 1], context, row)
            model.kernel.forward(rows)
            same = compare(model.kernel.logits[:1].copy(), alone, [context])
            if not record.check(check_name, not same.n_unequal, f"slot 0 among {rows}: {same.bits}"):
                record.result(check_name, same.facts())
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
