"""What a model will cost here, from its configuration alone: memory, phases, bytes per token, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from ..backends.packed import require_given
from ..check import check
from ..model.outline import read_outline
from ..program import Program, build
from ..program.ops import bytes_read
from .defaults import Defaults, read_defaults
from .setup import Options, Setup, kv_read_bytes, set_up


@dataclass(frozen=True)
class PhasePlan:
    """One phase. `bytes`: packed weights read by all workers; `worker_bytes`: by each."""

    op: str
    layer: int  # -1 outside the layers
    units: int
    bytes: int
    worker_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Shown by `flashformer plan`, and `llm.plan`. Sizes in bytes."""

    model: str
    device: str
    isa: str | None
    threads: int
    threads_why: str
    dtype: str
    quant: str  # format of the matrices of the layers, "none": dtype
    head_quant: str
    kv_dtype: str
    exact: bool
    ctx: int
    ctx_why: str
    streams: int
    prompt_chunk: int
    memory: Mapping[str, int]  # weights_bytes, kv_bytes, buffers_bytes, total_bytes
    free_bytes: int | None
    weight_bytes_per_token: int  # read once per forward, whatever its rows
    kv_bytes_per_position: int  # held of one position of a slot, and read of it by every layer that sees it
    kv_bytes_per_full_token: int  # read by a token of a slot with ctx positions
    phases: tuple[PhasePlan, ...]
    proof: Mapping[str, int] | None = None  # facts proved, by name
    probe_gb_per_s: float | None = None  # read bandwidth measured for this plan
    warnings: tuple[str, ...] = ()

    @property
    def floor_ms(self) -> float | None:
        """Least time of a token of one stream with an empty cache: bytes / measured bandwidth."""
        return self.weight_bytes_per_token / self.probe_gb_per_s / 1e6 if self.probe_gb_per_s else None

    @property
    def floor_full_ms(self) -> float | None:
        """The same with `ctx` cached positions."""
        n_bytes = self.weight_bytes_per_token + self.kv_bytes_per_full_token
        return n_bytes / self.probe_gb_per_s / 1e6 if self.probe_gb_per_s else None

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "floor_ms": self.floor_ms, "floor_full_ms": self.floor_full_ms}


def weight_read_bytes(program: Program) -> int:
    """Weights that every token must read, scales and zeros included, without the padding of tiles."""
    matrices = (phase.matrix for phase in program.phases if phase.matrix is not None)
    return sum(m.n_out * m.format.row_bytes(m.k) for m in matrices)


def make_plan(name: str, program: Program, setup: Setup, asked: Defaults, *, isa: object = None) -> Plan:
    target, memory, workers = program.target, program.memory, range(program.target.n_workers)
    phases = []
    for phase in program.phases:
        read = tuple(bytes_read(phase, worker) for worker in workers)
        phases.append(PhasePlan(phase.op.value, phase.layer, phase.n_units, sum(read), read))
    return Plan(
        model=name,
        device=setup.device,
        isa=setup.gpu.facts.arch if setup.gpu else None if isa is None else str(isa),
        threads=target.n_workers,
        threads_why=setup.workers_why,
        dtype=target.weight_format.name,
        quant=target.body_quant.name if target.body_quant else "none",
        head_quant=target.head_quant.name if target.head_quant else "none",
        kv_dtype=target.kv_format.name,
        exact=target.exact,
        ctx=target.ctx,
        ctx_why=setup.ctx_why,
        streams=target.streams,
        prompt_chunk=setup.prompt_chunk,
        memory={
            "weights_bytes": memory.weights_bytes,
            "kv_bytes": memory.kv_bytes,
            "buffers_bytes": memory.buffers_bytes,
            "total_bytes": memory.total_bytes,
        },
        free_bytes=None if setup.free is None else int(setup.free.value),
        weight_bytes_per_token=weight_read_bytes(program),
        kv_bytes_per_position=kv_read_bytes(program.spec, target.kv_format, 1),
        kv_bytes_per_full_token=kv_read_bytes(program.spec, target.kv_format, target.ctx),
        phases=tuple(phases),
        warnings=_warnings(program, setup, asked),
    )


def plan_model(
    model: str,
    options: Options,
    *,
    revision: str | None = None,
    offline: bool = False,
    prove: bool = False,
    isa: object = None,
) -> Plan:
    """The plan of a model that is not loaded, from its configuration. `prove` runs the proof too, as `load` does.

    Raises RequestError, LoadError and DeviceError as `load` would, ProgramError if the proof fails.
    """
    outline = read_outline(model, revision=revision, offline=offline)
    packed = outline.packed
    setup = set_up(outline.spec, outline.stored_format, options, packed.formats if packed else None)
    program = build(outline.spec, setup.target)
    if packed is not None:
        require_given(program, packed)
    plan = make_plan(outline.name, program, setup, read_defaults(outline.generation_config), isa=isa)
    plan = replace(plan, warnings=(*outline.warnings, *plan.warnings))
    return replace(plan, proof=dict(check(program).proved)) if prove else plan


def _warnings(program: Program, setup: Setup, asked: Defaults) -> tuple[str, ...]:
    found = [warning for warning in (setup.threads.warning, asked.warning) if warning]
    if setup.free is not None and program.memory.total_bytes > setup.free.value:
        found.append(
            f"needs {program.memory.total_bytes:,} bytes, {int(setup.free.value):,} are free: it will not load"
        )
    return tuple(found)
