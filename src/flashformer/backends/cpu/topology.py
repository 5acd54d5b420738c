"""What this machine lets the process use: cores, quota, caches, memory, huge pages.

Every function reads files of /proc and /sys below `root`, so that a test can lay out any machine as a folder.
A file that is missing means "no limit" or "unknown", never an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
ASSUMED_LLC_BYTES = 32 << 20  # where the system does not state its caches
_UNLIMITED = 1 << 62  # cgroup v1 writes "no limit" as a page-rounded 2^63 - 1


@dataclass(frozen=True)
class Limit:
    """A bound and the file that sets it."""

    value: float
    source: str


@dataclass(frozen=True)
class Threads:
    """How many threads to run and why. `cpus` are the ones to pin them to; empty: leave placement to the kernel."""

    n: int
    why: str
    cpus: tuple[int, ...] = ()
    warning: str | None = None


@dataclass(frozen=True)
class CpuInfo:
    model: str
    features: tuple[str, ...]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def affinity() -> frozenset[int]:
    """CPUs this process may run on. A cpuset is included: the kernel intersects with it."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


# ---- cgroups ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mount:
    point: str
    root: str  # the part of the hierarchy that is mounted here
    v2: bool
    options: frozenset[str]


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)


def _mounts(root: Path) -> list[_Mount]:
    """cgroup mounts of /proc/self/mountinfo: `id parent dev root point options... - type source super_options`."""
    mounts = []
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        left, dash, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if dash and len(fields) >= 5 and len(kind) >= 3 and kind[0] in ("cgroup", "cgroup2"):
            options = frozenset(kind[2].split(","))
            mounts.append(_Mount(_unescape(fields[4]), _unescape(fields[3]), kind[0] == "cgroup2", options))
    return mounts


def _own_path(root: Path, controller: str | None) -> str | None:
    """This process's cgroup in the v1 hierarchy of `controller`, or in the v2 hierarchy (None)."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if (controller is None and number == "0" and not controllers) or controller in controllers.split(","):
            return path
    return None


def cgroup_folders(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """(folder, is v2) of this process's cgroup and of all that contain it, innermost first, in both hierarchies.

    A container often sees its own cgroup as the root of the mount while /proc/self/cgroup gives the path on
    the host; what the mount does not show is cut off.
    """
    for mount in _mounts(root):
        if not mount.v2 and controller not in mount.options:
            continue
        own = _own_path(root, None if mount.v2 else controller)
        if own is None:
            continue
        inside = PurePosixPath("/" + own.lstrip("/"))
        inside = inside.relative_to(mount.root) if inside.is_relative_to(mount.root) else PurePosixPath()
        parts = [part for part in inside.parts if part not in ("/", "..")]
        point = root / mount.point.lstrip("/")
        for depth in range(len(parts), -1, -1):
            yield point.joinpath(*parts[:depth]), mount.v2


def cpu_quota(root: Path = ROOT) -> Limit | None:
    """The smallest CPU quota, in CPUs, along the path of nested cgroups; None without one."""
    limits = []
    for folder, v2 in cgroup_folders(root, "cpu"):
        if v2:
            found = re.fullmatch(r"(\d+) (\d+)", _text(folder / "cpu.max") or "")
            quota, period = (int(found[1]), int(found[2])) if found else (-1, 0)
            source = folder / "cpu.max"
        else:
            quota = _number(folder / "cpu.cfs_quota_us") or -1
            period = _number(folder / "cpu.cfs_period_us") or 0
            source = folder / "cpu.cfs_quota_us"
        if quota > 0 and period > 0:
            limits.append(Limit(quota / period, "/" + str(source.relative_to(root))))
    return min(limits, key=lambda limit: limit.value, default=None)


# ---- cores --------------------------------------------------------------------------------------------


def parse_cpu_list(text: str) -> list[int]:
    """`0-3,8` -> [0, 1, 2, 3, 8]."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def physical_cores(cpus: Collection[int], root: Path = ROOT) -> list[int]:
    """The first allowed CPU of every physical core that has one; SMT siblings count once."""
    firsts: dict[object, int] = {}
    for cpu in sorted(cpus):
        siblings = _text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core: object = min(parse_cpu_list(siblings)) if siblings else cpu
        firsts.setdefault(core, cpu)
    return list(firsts.values())


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def choose_threads(requested: int | None = None, *, cpus: Collection[int] | None = None, root: Path = ROOT) -> Threads:
    """One thread per allowed physical core, at most the whole CPUs of the quota, at least one.

    `requested` is obeyed as it is; where it exceeds the quota or the allowed CPUs, `warning` says so.
    """
    allowed = affinity() if cpus is None else cpus
    cores = physical_cores(allowed, root)
    quota = cpu_quota(root)
    found = f"{_plural(len(cores), 'physical core')} on {_plural(len(allowed), 'allowed CPU')}"
    limit = f"quota of {quota.value:g} CPUs ({quota.source})" if quota else "no CPU quota"
    if requested is not None:
        warning = None
        if quota and requested > quota.value:
            warning = f"{requested} threads asked for, but there is a {limit}: they will be stopped in every period"
        elif requested > len(allowed):
            warning = f"{requested} threads asked for, but only {_plural(len(allowed), 'CPU')} allowed: they will wait"
        pins = tuple(cores) if requested == len(cores) and warning is None else ()
        return Threads(requested, f"asked for; {found}, {limit}", pins, warning)
    if quota and int(quota.value) < len(cores):
        return Threads(max(1, int(quota.value)), f"{limit}; {found}")
    return Threads(len(cores), f"{found}, {limit}", tuple(cores))


# ---- caches and memory --------------------------------------------------------------------------------


def last_level_cache_bytes(root: Path = ROOT, cpus: Collection[int] | None = None) -> int:
    """Sum over the distinct last-level caches of the allowed CPUs; ASSUMED_LLC_BYTES if the system states none."""
    caches: dict[tuple[int, str], int] = {}
    for cpu in affinity() if cpus is None else cpus:
        for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
            level, kind, size = _number(index / "level"), _text(index / "type"), _text(index / "size")
            found = re.fullmatch(r"(\d+)([KMG]?)", size or "")
            if level is None or kind == "Instruction" or not found:
                continue
            shared = _text(index / "shared_cpu_list") or str(cpu)
            caches[level, shared] = int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or ASSUMED_LLC_BYTES


def caches_hold(n_bytes: int) -> bool:
    """Whether reading this much over and over says little about memory: less than four last-level caches."""
    return n_bytes < 4 * last_level_cache_bytes()


def _stat(folder: Path, key: str) -> int:
    found = re.search(rf"^{key} (\d+)$", _text(folder / "memory.stat") or "", re.MULTILINE)
    return int(found[1]) if found else 0


def free_memory(root: Path = ROOT) -> Limit | None:
    """Bytes that can be allocated now: MemAvailable, or what the tightest cgroup leaves; None if unknown.

    File pages that a cgroup can drop count as free.
    """
    limits = []
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(root / "proc/meminfo") or "", re.MULTILINE)
    if found:
        limits.append(Limit(int(found[1]) << 10, "MemAvailable of /proc/meminfo"))
    for folder, v2 in cgroup_folders(root, "memory"):
        names = ("memory.max", "memory.current", "inactive_file")
        if not v2:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        most, used = _number(folder / names[0]), _number(folder / names[1])
        if most is not None and most < _UNLIMITED and used is not None:
            free = most - used + min(_stat(folder, names[2]), used)
            limits.append(Limit(max(0, free), "/" + str((folder / names[0]).relative_to(root))))
    return min(limits, key=lambda limit: limit.value, default=None)


def huge_pages(root: Path = ROOT) -> str:
    """Transparent and reserved huge pages, in one phrase."""
    modes = _text(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(\w+)\]", modes)
    total = re.search(r"^HugePages_Total:\s+(\d+)$", _text(root / "proc/meminfo") or "", re.MULTILINE)
    return f"transparent {chosen[1] if chosen else 'unknown'}, {total[1] if total else 0} reserved"


_KERNEL_FEATURES = re.compile(
    r"avx|avx2|fma|f16c|avx_vnni|avx512(f|bw|vl|dq|_vnni|_bf16|_fp16|vbmi)|amx_\w+|asimd|asimddp|asimdhp|bf16|i8mm|sve\d?"
)


def cpu_info(root: Path = ROOT) -> CpuInfo:
    """Name and the features that kernels care about, from /proc/cpuinfo.

    x86's family and model numbers belong to the name: a virtual machine's "AMD EPYC" may be any of five generations.
    """
    text = _text(root / "proc/cpuinfo") or ""

    def value(key: str) -> str | None:
        found = re.search(rf"^(?:{key})\s*:\s*(.+)$", text, re.MULTILINE)
        return found[1].strip() if found else None

    name = value("model name|Model|CPU part") or "unknown"
    family, model = value("cpu family"), value("model")
    words = (value("flags|Features") or "").split()
    return CpuInfo(
        f"{name}, family {family}, model {model}" if family and model else name,
        tuple(w for w in words if _KERNEL_FEATURES.fullmatch(w)),
    )


def software_prefetch(root: Path = ROOT) -> str:
    """How often one row should ask for weights before it reads them (docs/measuring.md): one of `env.PREFETCHES`.

    A Xeon with AMX reads bf16 weights 1.4 times as fast if it asks twice. AMD's cores read slower with that; from Zen 5
    (family 26) on, codes of 4 bits gain by asking once.
    """
    text = _text(root / "proc/cpuinfo") or ""
    vendor = re.search(r"^vendor_id\s*:\s*(\w+)$", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*:\s*(\d+)$", text, re.MULTILINE)
    if vendor and vendor[1] == "GenuineIntel":
        return "twice"
    return "once" if vendor and family and vendor[1] == "AuthenticAMD" and int(family[1]) >= 26 else "never"
