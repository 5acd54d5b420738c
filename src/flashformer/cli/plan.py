"""flashformer plan"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ..backends.cpu import topology
from ..backends.cpu.bandwidth import ReadProbe
from ..backends.registry import native_isa
from ..engine import Plan, plan_model
from ..errors import DeviceError
from .options import JsonOpt, Machine, ModelArg, QuietOpt, Room, grouped
from .output import warn, write, write_json

PROBE_S = 0.5


@grouped
def plan(
    model: ModelArg,
    room: Room,
    machine: Machine,
    check: Annotated[bool, typer.Option("--check", help="prove the program and count what was proved")] = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Memory, phases, bytes per token and the least time per token, with reasons. Reads no weights."""
    made = plan_model(
        model,
        machine.options(room.ctx, room.streams),
        revision=machine.revision,
        offline=machine.offline,
        prove=check,
        isa=native_isa(),
    )
    made = _measured(made)
    if as_json:
        write_json(made.to_json())
    else:
        write(render(made))
    for warning in made.warnings:
        warn(warning)


def _measured(made: Plan) -> Plan:
    """The plan with this machine's read bandwidth, over the smallest region that no cache helps with."""
    if made.device == "cuda":
        warn("no floor is given: the bandwidth of a GPU is measured by `flashformer bench`")
        return made
    try:
        probe = ReadProbe(made.threads, 8 * topology.last_level_cache_bytes())
        return replace(made, probe_gb_per_s=probe.gb_s(PROBE_S))
    except DeviceError as error:
        warn(f"no bandwidth was measured, so no floor is given: {error}")
        return made


def size(n_bytes: int) -> str:
    """Bytes for people: three digits and a binary unit."""
    value, unit = float(n_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def render(made: Plan) -> str:
    """The plan as text. Layers with equal phases share a line."""
    memory = made.memory
    lines = [
        f"model      {made.model}: weights {_weights(made)}, KV {made.kv_dtype}"
        + (", exact activations" if made.exact else ""),
        f"device     {made.device}" + (f", {made.isa}" if made.isa else ""),
        f"threads    {made.threads}: {made.threads_why}",
        f"context    {made.ctx}: {made.ctx_why}",
        f"streams    {made.streams}, prompts in chunks of {made.prompt_chunk}",
        f"memory     {size(memory['total_bytes'])}: weights {size(memory['weights_bytes'])}, "
        f"KV {size(memory['kv_bytes'])}, buffers {size(memory['buffers_bytes'])}"
        + (f"; {size(made.free_bytes)} free" if made.free_bytes is not None else ""),
        f"per token  {size(made.weight_bytes_per_token)} of weights, and per cached position "
        f"{size(made.kv_bytes_per_position)} of KV",
    ]
    if made.floor_ms is not None and made.floor_full_ms is not None:
        lines.append(
            f"floor      {made.floor_ms:.3g} ms per token at {made.probe_gb_per_s:.1f} GB/s measured now "
            f"({made.floor_full_ms:.3g} ms with {made.ctx} positions cached)"
        )
        if topology.caches_hold(made.weight_bytes_per_token):
            lines.append("           of memory: the weights fit in cache, which may be faster")
    lines += ["", f"{'phase':10} {'times':>5} {'units':>7} {'bytes each':>11}  per worker", *_phase_lines(made)]
    if made.proof is not None:
        lines += ["", "proved"] + [f"  {count:>9,} {fact}" for fact, count in made.proof.items()]
    return "\n".join(lines) + "\n"


def _weights(made: Plan) -> str:
    if made.quant == "none":
        return made.dtype
    return f"{made.quant}, head {made.head_quant}, the rest {made.dtype}"


def _phase_lines(made: Plan) -> list[str]:
    groups: dict[tuple[str, int, int], list[tuple[int, ...]]] = {}
    for phase in made.phases:
        groups.setdefault((phase.op, phase.units, phase.bytes), []).append(phase.worker_bytes)
    lines = []
    for (op, units, n_bytes), workers in groups.items():
        least, most = min(map(min, workers)), max(map(max, workers))
        share = "-" if not most else size(least) if least == most else f"{size(least)} to {size(most)}"
        lines.append(f"{op:10} {len(workers):>5} {units:>7} {size(n_bytes) if n_bytes else '-':>11}  {share}")
    return lines
