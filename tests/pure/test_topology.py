"""Threads, quota, caches and memory, read from machines laid out as folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashformer.backends.cpu import topology

V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1_MOUNTS = (
    "40 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:30 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "30 23 0:27 / /proc rw - proc proc rw\n"
)


class Tree:
    """A fake root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def cpus(self, n: int, smt: int = 1) -> range:
        """n CPUs; siblings are c and c + n/smt, as Linux numbers them."""
        n_cores = n // smt
        for cpu in range(n):
            siblings = ",".join(str(cpu % n_cores + i * n_cores) for i in range(smt))
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
        return range(n)

    def cache(self, cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
        folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
        for name, value in {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}.items():
            self.write(f"{folder}/{name}", value)

    def v2(self, own: str = "/", mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{own}")
        self.write("proc/self/mountinfo", V2_MOUNT.format(root=mount_root))

    def v1(self, own: str = "/", mount_root: str = "/") -> None:
        self.write("proc/self/cgroup", f"4:memory:{own}\n3:cpu,cpuacct:{own}\n1:name=systemd:/\n0::/")
        self.write("proc/self/mountinfo", V1_MOUNTS.format(root=mount_root))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_c49_quota_of_4_on_64_cores_gives_4(tree: Tree) -> None:
    cpus = tree.cpus(64)
    tree.v2()
    tree.write("sys/fs/cgroup/cpu.max", "400000 100000")
    threads = topology.choose_threads(cpus=cpus, root=tree.root)
    assert threads.n == 4
    assert "quota of 4 CPUs (/sys/fs/cgroup/cpu.max)" in threads.why
    assert threads.cpus == ()


@pytest.mark.parametrize(("quota", "n"), [("150000 100000", 1), ("50000 100000", 1), ("399999 100000", 3)])
def test_c49_fractional_quota_is_rounded_down_to_at_least_one(tree: Tree, quota: str, n: int) -> None:
    cpus = tree.cpus(8)
    tree.v2()
    tree.write("sys/fs/cgroup/cpu.max", quota)
    assert topology.choose_threads(cpus=cpus, root=tree.root).n == n


def test_c49_smallest_quota_of_nested_groups_counts(tree: Tree) -> None:
    cpus = tree.cpus(32)
    tree.v2("/pod/box/app")
    for folder, quota in {"pod": "600000 100000", "pod/box": "250000 50000", "pod/box/app": "max 100000"}.items():
        tree.write(f"sys/fs/cgroup/{folder}/cpu.max", quota)
    threads = topology.choose_threads(cpus=cpus, root=tree.root)
    assert threads.n == 5
    assert "/sys/fs/cgroup/pod/box/cpu.max" in threads.why


def test_v1_quota_under_a_mount_of_the_containers_own_group(tree: Tree) -> None:
    cpus = tree.cpus(16)
    tree.v1("/docker/abc", mount_root="/docker/abc")
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", 300000)
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", 100000)
    assert topology.choose_threads(cpus=cpus, root=tree.root).n == 3


def test_v1_path_that_the_mount_does_not_show_is_cut_off(tree: Tree) -> None:
    cpus = tree.cpus(16)
    tree.v1("/host/path", mount_root="/elsewhere")
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", 200000)
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", 100000)
    assert topology.choose_threads(cpus=cpus, root=tree.root).n == 2


def test_c49_no_quota_counts_physical_cores_among_the_allowed_cpus(tree: Tree) -> None:
    tree.cpus(16, smt=2)
    tree.v1()
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", -1)
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", 100000)
    threads = topology.choose_threads(cpus={2, 3, 10, 13}, root=tree.root)  # 2 and 10 are one core
    assert (threads.n, threads.cpus) == (3, (2, 3, 13))
    assert "no CPU quota" in threads.why


def test_quota_above_the_cores_changes_nothing(tree: Tree) -> None:
    cpus = tree.cpus(4, smt=2)
    tree.v2()
    tree.write("sys/fs/cgroup/cpu.max", "4000000 100000")
    assert topology.choose_threads(cpus=cpus, root=tree.root).n == 2


def test_c49_explicit_threads_are_obeyed_with_a_warning_above_the_quota(tree: Tree) -> None:
    cpus = tree.cpus(8)
    tree.v2()
    tree.write("sys/fs/cgroup/cpu.max", "200000 100000")
    above = topology.choose_threads(6, cpus=cpus, root=tree.root)
    assert above.n == 6
    assert above.warning is not None
    assert "quota of 2 CPUs" in above.warning
    assert topology.choose_threads(2, cpus=cpus, root=tree.root).warning is None


def test_more_threads_than_cpus_warn_without_a_quota(tree: Tree) -> None:
    cpus = tree.cpus(2)
    assert topology.choose_threads(3, cpus=cpus, root=tree.root).warning is not None
    assert topology.choose_threads(2, cpus=cpus, root=tree.root).warning is None


def test_an_empty_machine_gives_one_thread_per_cpu(tree: Tree) -> None:
    assert topology.choose_threads(cpus={0, 1, 2}, root=tree.root).n == 3
    assert topology.free_memory(tree.root) is None
    assert topology.last_level_cache_bytes(tree.root, {0}) == topology.ASSUMED_LLC_BYTES
    assert topology.cpu_info(tree.root).model == "unknown"


def test_last_level_caches_are_summed_once_each(tree: Tree) -> None:
    for cpu in range(4):
        tree.cache(cpu, 0, 1, "Data", "32K", str(cpu))
        tree.cache(cpu, 1, 1, "Instruction", "64M", str(cpu))
        tree.cache(cpu, 2, 3, "Unified", "16M", "0-1" if cpu < 2 else "2-3")
    assert topology.last_level_cache_bytes(tree.root, range(4)) == 32 << 20
    assert topology.last_level_cache_bytes(tree.root, {0, 1}) == 16 << 20


def test_c48_free_memory_is_the_tightest_of_machine_and_groups(tree: Tree) -> None:
    tree.v2("/a/b")
    tree.write("proc/meminfo", "MemTotal:       2000000 kB\nMemAvailable:   1000000 kB\nHugePages_Total:       7")
    tree.write("sys/fs/cgroup/a/memory.max", 600 << 20)
    tree.write("sys/fs/cgroup/a/memory.current", 500 << 20)
    tree.write("sys/fs/cgroup/a/memory.stat", f"anon 5\ninactive_file {300 << 20}\nactive_file 1")
    tree.write("sys/fs/cgroup/a/b/memory.max", "max")
    free = topology.free_memory(tree.root)
    assert free is not None
    assert (free.value, free.source) == (400 << 20, "/sys/fs/cgroup/a/memory.max")
    assert topology.huge_pages(tree.root) == "transparent unknown, 7 reserved"


def test_free_memory_v1_ignores_the_unlimited_mark(tree: Tree) -> None:
    tree.v1("/x")
    tree.write("proc/meminfo", "MemAvailable:   1000 kB")
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    tree.write("sys/fs/cgroup/memory/memory.usage_in_bytes", 5)
    free = topology.free_memory(tree.root)
    assert free is not None
    assert free.value == 1000 << 10
    tree.write("sys/fs/cgroup/memory/x/memory.limit_in_bytes", 1000)
    tree.write("sys/fs/cgroup/memory/x/memory.usage_in_bytes", 400)
    free = topology.free_memory(tree.root)
    assert free is not None
    assert free.value == 600


def test_cpu_lists_and_features(tree: Tree) -> None:
    assert topology.parse_cpu_list("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    tree.write("proc/cpuinfo", "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni avx512_bf16 sse")
    info = topology.cpu_info(tree.root)
    assert (info.model, info.features) == ("Some CPU", ("avx2", "avx512_vnni", "avx512_bf16"))
    tree.write("proc/cpuinfo", "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: Some CPU\n")
    assert topology.cpu_info(tree.root).model == "Some CPU, family 26, model 2"


@pytest.mark.parametrize(
    ("vendor", "family", "asks"),
    [
        ("GenuineIntel", 6, "twice"),
        ("AuthenticAMD", 25, "never"),
        ("AuthenticAMD", 26, "once"),
        ("Another", 26, "never"),
        (None, 0, "never"),
    ],
)
def test_software_prefetch_by_vendor_and_family(tree: Tree, vendor: str | None, family: int, asks: str) -> None:
    tree.write(
        "proc/cpuinfo", "processor\t: 0\n" + (f"vendor_id\t: {vendor}\ncpu family\t: {family}\n" if vendor else "")
    )
    assert topology.software_prefetch(tree.root) == asks


def test_this_machine_gets_at_least_one_thread() -> None:
    threads = topology.choose_threads()
    assert 1 <= threads.n <= len(topology.affinity())
