"""flashformer doctor"""

from __future__ import annotations

import platform
import sys
from typing import Annotated

import typer

from ..backends.cpu import topology
from ..backends.kept import kept_bytes
from ..backends.registry import describe_cuda, native_isa
from ..engine import Diagnosis, Options, diagnose
from ..engine.stats import peak_rss_bytes
from ..env import cache_folder, prefetch
from ..env import isa as requested_isa
from ..errors import RequestError
from ..version import __version__
from .options import JsonOpt, OfflineOpt, QuietOpt, RevisionOpt
from .output import write, write_json
from .plan import size


def doctor(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="say too why this model does not run, or that it does"),
    ] = None,
    revision: RevisionOpt = None,
    offline: OfflineOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Describe this machine, to paste into an issue. With --model, exit code 2 says that the model does not run."""
    if model is None and (revision is not None or offline):
        raise RequestError("--revision and --offline say where --model is looked for; give --model too")
    found = describe_machine()
    if not as_json:
        write("".join(f"{name:14} {_shown(name, value)}\n" for name, value in found.items()))
    made = None if model is None else diagnose(model, Options(), revision=revision, offline=offline)
    if as_json:
        write_json(found if made is None else {**found, "diagnosis": made.to_json()})
    elif made is not None:
        write(f"\n{render(made)}")
    if made is not None and not made.runs:
        raise typer.Exit(2)


def render(made: Diagnosis) -> str:
    """The diagnosis as text, a line per message."""
    lines = [f"{'model':14} {made.model}"]
    for step in made.steps:
        for i, message in enumerate(step.messages):
            lines.append(f"{'' if i else step.name:14} {step.verdict.value:9} {message}")
    return "\n".join([*lines, f"{'runs':14} {'yes' if made.runs else 'no'}"]) + "\n"


def describe_machine() -> dict[str, object]:
    """Facts that decide how fast and whether a model runs here. Sizes in bytes."""
    cpu, allowed, threads = topology.cpu_info(), topology.affinity(), topology.choose_threads()
    quota, free, isa = topology.cpu_quota(), topology.free_memory(), native_isa()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "extension": "present" if isa is not None else "missing",
        "isa": isa,
        "isa_requested": requested_isa(),
        "cpu": cpu.model,
        "cpu_features": list(cpu.features),
        "prefetch": prefetch(topology.software_prefetch()),
        "llc_bytes": topology.last_level_cache_bytes(),
        **describe_cuda(),
        "affinity": sorted(allowed),
        "physical_cores": len(topology.physical_cores(allowed)),
        "quota_cpus": quota.value if quota else None,
        "threads": threads.n,
        "threads_why": threads.why,
        "huge_pages": topology.huge_pages(),
        "free_bytes": int(free.value) if free else None,
        "free_source": free.source if free else None,
        "rss_bytes": peak_rss_bytes(),
        "cache": str(folder) if (folder := cache_folder()) else None,
        "cache_bytes": kept_bytes(),
        "byte_order": sys.byteorder,
    }


def _shown(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return size(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)
