"""Every ordering of the kernel is needed by a whole forward, mistakes of the field are found in it, and waits that
cannot end do end, in an error that says who waited where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_on_host.faults import FAULTS, Fault
from gpu_on_host.host_gpu import BUILDER
from gpu_on_host.one_forward import TARGET, counts, one_kernel, run, same, sound, verdict
from gpu_on_host.simulator import Mode
from gpu_on_host.whole import gpu_of

from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.errors import DeviceError

SEEDS = (1, 2)
SHARED, WORK, EARLY = "unordered accesses to shared", "unordered accesses to work", "reads what was never written"
REFILLED = f"{SHARED}.* bulk_copy at ring.cuh"
RECORDS = f"{SHARED}.* at kernel.cuh"  # of the phase, which one warp copies

Kinds = tuple[str, str]


def shared(files: str, off: str = "out of bounds") -> Kinds:
    """In shared memory, at one of the files. Without the meeting other things go wrong too."""
    return f"({SHARED}|{EARLY}|{off}).* at ({files})", f"{SHARED}.* at ({files})"


# What is found where a site does nothing, and where it keeps its effect (meeting, arrival, value) but orders nothing.
KINDS: dict[str, Kinds] = {
    "kInitFence": ("missing fence_mbar_init", "missing fence_mbar_init"),
    "kInitBar": (
        f"no initialised mbarrier|missing barrier after mbar_init|{EARLY}.* at tokens.cuh",
        f"missing barrier after mbar_init|{SHARED}.* at tokens.cuh",
    ),
    "kWaitEmpty": (f"{REFILLED}|arrives at mbarrier .* once too often", REFILLED),
    "kProducerFence": ("missing fence_proxy_async", "missing fence_proxy_async"),
    "kExpect": ("deadlock.*kWaitFull", ""),
    "kWaitFull": (f"{SHARED}.* written by the copy engine",) * 2,
    "kSlotWarp": (REFILLED, REFILLED),
    "kSlotRelease": ("deadlock.*kWaitEmpty", REFILLED),
    "kHandoffPoll": (f"{WORK}.* Missing: ld_acquire",) * 2,
    "kHandoffBar": (
        f"{WORK}|{RECORDS}|{EARLY}",
        f"{WORK}.* Missing: bar_sync or warp_sync after the acquire|{RECORDS}",
    ),
    "kPhaseBar": (f"{WORK}.* Missing: bar_sync before the release|{RECORDS}",) * 2,
    "kHandoffFence": (f"{WORK}.* Missing: fence_gpu before the release",) * 2,
    "kHandoffArrive": ("deadlock.*kHandoffPoll", f"{WORK}.* Missing: release"),
    "kSumsBar": shared("stage.cuh"),
    "kFactorsBar": shared("stage.cuh"),
    "kScaleBar": shared("stage.cuh"),
    "kStageBar": shared("stage.cuh|weights.cuh"),
    "kPartialBar": shared("product.cuh"),
    "kBadBar": shared("kernel.cuh"),
    "kQkFactorsBar": shared("heads.cuh"),
    "kQueryBar": (f"({SHARED}|{EARLY}|unordered accesses to kv).* at attend.cuh",) * 2,
    "kScoresBar": shared("attend.cuh"),
    "kWeightsWarp": (f"{SHARED}.* between the lanes of the warp",) * 2,
    "kWeightsBar": shared("attend.cuh"),
    "kPartsBar": shared("attend.cuh"),
    "kMergeStored": (f"{WORK}.* at merge.cuh",) * 2,
    "kMergeFence": (f"{WORK}.* at merge.cuh",) * 2,
    "kMergeArrive": (f"{WORK}.* at merge.cuh",) * 2,
    "kMergeSeen": (f"{WORK}.* at merge.cuh",) * 2,
    "kMergeWarp": ("between the lanes of the warp",) * 2,
    "kMergeBar": shared("merge.cuh"),
    "kChooseSum": shared("choose.cuh"),
    "kChooseMax": shared("choose.cuh"),
    "kChooseBest": shared("choose.cuh"),
    "kSampleAdjusted": (f"{WORK}.* at (sample.cuh|choose.cuh)",) * 2,
    "kSampleUnit": shared("choose.cuh"),
}

# Why nothing is found, and nothing is wrong.
EQUIVALENT = {
    ("kExpect", Mode.UNORDERED): "consumers learn from it only that the bytes have come, and the copy orders those: "
    "the producer stores nothing that they read",
    ("kDrain", Mode.OFF): "all consumer warps wait for every slot of the tape before they end, and the block ends with "
    "its last warp; only after an abort, or where they take less than the tape has, copies are under way at "
    "the end (test_orders.py: test_a_block_waits_for_its_copies)",
    ("kDrain", Mode.UNORDERED): "as above; the producer reads nothing after it",
    ("kAbortClaim", Mode.OFF): "not reached but in an abort; there the sum stays atomic in both modes, one thread gets "
    "0 from it and writes the record, and nobody but the host reads that",
    ("kAbortClaim", Mode.UNORDERED): "as above",
}

MUTANTS = [(site, mode) for site in KINDS for mode in (Mode.OFF, Mode.UNORDERED) if (site, mode) not in EQUIVALENT]


def test_the_forward_comes_by_every_site() -> None:
    kernel = one_kernel()
    assert same(run(kernel))
    reached = {site for site, n in counts(kernel).items() if n}
    assert reached == {*KINDS, "kDrain"}
    assert {*KINDS, "kDrain", "kAbortClaim"} == set(counts(kernel))


@pytest.mark.parametrize(("site", "mode"), MUTANTS)
def test_every_ordering_is_needed(site: str, mode: Mode) -> None:
    for seed in SEEDS:
        found = verdict(one_kernel(options={"seed": seed}, sites={site: mode}))
        assert re.search(KINDS[site][mode - Mode.OFF], found, re.DOTALL), found


@pytest.mark.long
@pytest.mark.parametrize(("site", "mode"), MUTANTS)
def test_every_ordering_is_needed_in_any_schedule(site: str, mode: Mode) -> None:
    for seed in range(100, 140):
        assert verdict(one_kernel(options={"seed": seed}, sites={site: mode})), seed


@pytest.mark.parametrize(("site", "mode"), EQUIVALENT)
def test_what_is_not_needed_is_known(site: str, mode: Mode) -> None:
    for seed in SEEDS:
        assert verdict(one_kernel(options={"seed": seed}, sites={site: mode})) == ""


# ---- mistakes of the field


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, CudaKernel]]:
    """A kernel for every fault; all are being built while the first one runs."""
    sound()
    folder = tmp_path_factory.mktemp("faults")
    yield {fault.name: one_kernel(device=fault.put_into(folder / str(i)), ahead=True) for i, fault in enumerate(FAULTS)}
    BUILDER.give_up()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_known_fault_is_found(fault: Fault, faulty: dict[str, CudaKernel]) -> None:
    assert re.search(fault.found, verdict(faulty[fault.name]), re.DOTALL)


def test_a_fault_must_fit_the_source(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="0 times"):
        Fault("", (("ring.cuh", "not in there", ""),), "").put_into(tmp_path)


# ---- waits that cannot end

# Site that is switched off -> who may be the first to give up.
STUCK = {
    "kHandoffArrive": "thread 0: all blocks have arrived; {seen} seen, {expected} expected"
    "|producer: all consumer warps have left the slot",
    "kSlotRelease": "consumer: the bytes of the slot have come|producer: all consumer warps have left the slot",
}


@pytest.mark.parametrize("site", STUCK)
@pytest.mark.parametrize("seed", range(3))
def test_a_wait_in_vain_ends_in_an_error(site: str, seed: int) -> None:
    kernel = one_kernel(options={"seed": seed, "stop_at_deadlock": 0}, spin_cycles=1_000_000)
    assert same(run(kernel)), "a wait that is not in vain has to end first"
    gpu_of(kernel).sites = {site: Mode.OFF}
    who = STUCK[site].format(seen=kernel._base, expected=kernel._base + TARGET.n_workers)
    with pytest.raises(DeviceError) as caught:
        run(kernel)
    found = str(caught.value)
    assert re.match(rf"block [012] waited in vain in phase 1 \(qkv of layer 0\): ({who})", found), found
    gpu_of(kernel).sites = {}
    assert same(run(kernel)), "the forward after it"
