"""flashformer doctor"""

from __future__ import annotations

import platform
import sys

from ..backends.cpu import topology
from ..backends.registry import native_isa
from ..engine.stats import peak_rss_bytes
from ..env import isa as requested_isa
from ..version import __version__
from .options import JsonOpt
from .output import write, write_json
from .plan import size


def doctor(as_json: JsonOpt = False) -> None:
    """Describe this machine, to paste into an issue."""
    found = describe_machine()
    if as_json:
        write_json(found)
    else:
        write("".join(f"{name:14} {_shown(name, value)}\n" for name, value in found.items()))


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
        "llc_bytes": topology.last_level_cache_bytes(),
        "affinity": sorted(allowed),
        "physical_cores": len(topology.physical_cores(allowed)),
        "quota_cpus": quota.value if quota else None,
        "threads": threads.n,
        "threads_why": threads.why,
        "huge_pages": topology.huge_pages(),
        "free_bytes": int(free.value) if free else None,
        "free_source": free.source if free else None,
        "rss_bytes": peak_rss_bytes(),
        "byte_order": sys.byteorder,
    }


def _shown(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return size(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)
