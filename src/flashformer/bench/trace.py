"""Where one forward spends its time: every phase and every wait of every worker; for Perfetto, or as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from time import perf_counter_ns

import numpy as np

from ..backends.base import Times, Want
from ..engine import LLM
from ..engine.request import integer
from ..program.ir import Op, Program
from ..program.ops import bytes_read
from .decode import TOKEN_SEED, fill

WAIT = "wait"
WARM_UP = 3
COLOURS = {
    Op.EMBED: "#888888", Op.QKV: "#4477aa", Op.ATTEND: "#ee6677", Op.O_PROJ: "#66ccee", Op.GATE_UP: "#228833",
    Op.DOWN: "#ccbb44", Op.LM_HEAD: "#aa3377", Op.SAMPLE: "#333333",
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """What one worker did from `begin` to `end`, ns from the start of the forward."""

    worker: int
    phase: int  # for a wait: the phase that it is before
    name: str  # op, or WAIT
    layer: int
    begin: int
    end: int
    n_bytes: int  # of weights that were read


@dataclass(frozen=True)
class Trace:
    """One forward of a loaded model. `wall_ns`: as its caller saw it."""

    program: Program
    times: Times
    wall_ns: int

    def slices(self) -> Iterator[Slice]:
        """Phases and waits of each worker in turn, without gaps from the start of the forward to its last phase."""
        origin = self.times.begin
        for worker in range(self.program.target.n_workers):
            before = origin
            pairs = zip(self.times.entered[worker].tolist(), self.times.left[worker].tolist(), strict=True)
            for index, (entered, left) in enumerate(pairs):
                phase = self.program.phases[index]
                yield Slice(worker, index, WAIT, phase.layer, before - origin, entered - origin, 0)
                n_bytes = bytes_read(phase, worker)
                yield Slice(worker, index, phase.op.value, phase.layer, entered - origin, left - origin, n_bytes)
                before = left

    @property
    def accounted(self) -> float:
        """Share of the caller's wall time that the slices of a worker cover, the mean over workers."""
        covered = self.times.left[:, -1] - self.times.begin
        return float(np.mean(covered)) / self.wall_ns

    def totals(self) -> dict[str, tuple[float, int]]:
        """Name -> (share of all workers' time, bytes read)."""
        ns: defaultdict[str, int] = defaultdict(int)
        n_bytes: defaultdict[str, int] = defaultdict(int)
        for s in self.slices():
            ns[s.name] += s.end - s.begin
            n_bytes[s.name] += s.n_bytes
        whole = sum(ns.values())
        return {name: (spent / whole, n_bytes[name]) for name, spent in ns.items()}

    def chrome(self) -> dict[str, object]:
        """The trace event format that Perfetto and chrome://tracing read; times in microseconds."""
        events: list[dict[str, object]] = [
            {"ph": "M", "pid": 0, "tid": w, "name": "thread_name", "args": {"name": f"worker {w}"}}
            for w in range(self.program.target.n_workers)
        ]
        for s in self.slices():
            if s.end == s.begin:
                continue
            arguments = {
                "phase": s.phase,
                "layer": s.layer,
                "bytes": s.n_bytes,
                "gb_per_s": s.n_bytes / (s.end - s.begin),
            }
            events.append(
                {"ph": "X", "pid": 0, "tid": s.worker, "name": s.name, "ts": s.begin / 1e3,
                 "dur": (s.end - s.begin) / 1e3, "args": arguments}
            )  # fmt: skip
        return {"traceEvents": events, "displayTimeUnit": "ns"}

    def html(self, title: str) -> str:
        """One page without anything from outside: a lane for each worker, to scale; hover for numbers."""
        width, lane = 2400, 28
        scale = width / max(self.times.end - self.times.begin, 1)
        boxes = []
        for s in self.slices():
            if s.name == WAIT or s.end == s.begin:
                continue
            text = (
                f"{s.name} layer {s.layer}: {(s.end - s.begin) / 1e3:.1f} us, {s.n_bytes / (s.end - s.begin):.1f} GB/s"
            )
            wide = max((s.end - s.begin) * scale, 0.1)
            boxes.append(
                f'<rect x="{s.begin * scale:.2f}" y="{s.worker * lane}" width="{wide:.2f}" '
                f'height="{lane - 4}" fill="{COLOURS[Op(s.name)]}"><title>{escape(text)}</title></rect>'
            )
        legend = "".join(f'<span style="color:{c}">&#9632; {op.value}</span> ' for op, c in COLOURS.items())
        height = self.program.target.n_workers * lane
        return (
            f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title>'
            f"<style>body{{font:14px sans-serif;margin:1em}}div{{overflow-x:auto}}</style><h1>{escape(title)}</h1>"
            f"<p>{self.wall_ns / 1e6:.3f} ms; white is waiting. {legend}</p>"
            f'<div><svg width="{width}" height="{height}">{"".join(boxes)}</svg></div>'
        )


def trace_forward(llm: LLM, *, depth: int = 0, rows: int = 1) -> Trace:
    """The fastest of a few forwards that make one token in each of `rows` slots of `depth` cached positions."""
    target = llm.setup.target
    integer("depth", depth, (0, target.ctx - 1))
    integer("rows", rows, (1, target.streams))
    start = max(depth, 1)
    ids = np.random.default_rng(TOKEN_SEED).integers(0, llm.spec.vocab_size, (rows, start), np.int32)
    kernel, best = llm.kernel, None
    with llm.turns.lock:
        llm.turns.check()
        llm.forget()
        for slot in range(rows):
            fill(llm, slot, ids[slot])
        kernel.keep_times()
        r = kernel.rows
        r.token[:rows], r.slot[:rows], r.pos[:rows], r.want[:rows] = ids[:, 0], np.arange(rows), start, Want.TOKEN
        r.temperature[:rows] = r.adjust_begin[:rows] = r.adjust_end[:rows] = 0
        for attempt in range(WARM_UP + 7):
            begin = perf_counter_ns()
            kernel.forward(rows)
            wall = perf_counter_ns() - begin
            if attempt >= WARM_UP and (best is None or wall < best.wall_ns):
                best = Trace(llm.program, kernel.times(), wall)
    assert best is not None
    return best
