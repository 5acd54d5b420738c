"""The simulator finds what it should and nothing else: a little ring, sound and with every ordering taken away."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_on_host.cases_run import Faults, Ring, names
from gpu_on_host.simulator import Mode, Policy

SEEDS = range(10)
# What is found when a site is switched off: one of these texts, whatever the schedule.
OFF = {
    "kInitFence": ["missing fence_mbar_init"],
    "kInitBar": ["missing barrier after mbar_init", "which is no initialised mbarrier"],
    "kWaitEmpty": ["once too often", "Missing: mbar_try_wait", "Missing: bar_sync"],
    "kProducerFence": ["missing fence_proxy_async: shared ring"],
    "kExpect": ["deadlock"],
    "kWaitFull": ["Missing: mbar_try_wait for phase", "never written"],
    "kSlotWarp": ["Missing: bar_sync (or an mbarrier) between warps"],
    "kSlotRelease": ["deadlock"],
    "kHandoffPoll": ["Missing: ld_acquire", "Missing: release"],
    "kHandoffBar": ["Missing: "],
    "kPhaseBar": ["Missing: bar_sync before the release of block"],
    "kHandoffFence": ["Missing: fence_gpu before the release of block"],
    "kHandoffArrive": ["deadlock"],
    "kStageBar": ["Missing: bar_sync (or an mbarrier) between warps", "Missing: warp_sync", "never written"],
    "kPartialBar": ["Missing: bar_sync (or an mbarrier) between warps", "Missing: warp_sync", "never written"],
}


@pytest.mark.parametrize("variation", [Ring.SOUND, Ring.LATE_FENCE])
def test_the_sound_ring_passes(variation: int) -> None:
    orders = set()
    for seed in range(50):
        ring = Ring(seed, variation)
        assert ring.run() == ""
        assert ring.correct()
        stats = ring.simulator.stats()
        assert stats.copies == ring.N_BLOCKS * ring.N_PHASES * ring.N_SLOTS
        orders.add((stats.switches, stats.polls))
    assert len(orders) > 40  # seeds make different schedules


@pytest.mark.parametrize("policy", list(Policy))
def test_a_seed_means_one_schedule(policy: Policy) -> None:
    seen = []
    for _ in range(2):
        ring = Ring(7, policy=policy)
        assert ring.run() == ""
        seen.append(bytes(ring.simulator.stats()))
    assert seen[0] == seen[1]


def test_one_machine_runs_launch_after_launch() -> None:
    ring = Ring(3, base=5)
    for launch in range(3):
        ring.x[0] = np.arange(ring.x.shape[1]) + launch
        ring.expected = ring.reference()
        ring.launch.base = int(ring.counter[0])
        ring.simulator.option(seed=launch)
        assert ring.run() == ""
        assert ring.correct()
    assert ring.counter[0] == 5 + 3 * ring.N_BLOCKS * ring.N_PHASES


def test_every_site_of_the_ring_is_counted() -> None:
    ring = Ring(1)
    assert ring.run() == ""
    counts = ring.simulator.counts()
    assert sorted(name for name, count in counts.items() if count) == sorted(OFF)
    blocks = ring.N_BLOCKS
    slots = blocks * ring.N_PHASES * ring.N_SLOTS
    assert counts["kInitBar"] == 160 * blocks
    assert counts["kExpect"] == counts["kProducerFence"] == slots
    assert counts["kSlotRelease"] == 4 * slots
    assert counts["kHandoffArrive"] == blocks * ring.N_PHASES


# The effect stays and only the ordering goes: always an unordered pair, never a wrong number or a hang.
UNORDERED = {
    "kWaitEmpty": "Missing: mbar_try_wait for phase",
    "kWaitFull": "Missing: mbar_try_wait for phase",
    "kSlotWarp": "Missing: bar_sync (or an mbarrier) between warps",
    "kSlotRelease": "Missing: mbar_try_wait for phase",
    "kHandoffPoll": "Missing: ld_acquire: block",
    "kHandoffBar": "Missing: bar_sync or warp_sync after the acquire",
    "kPhaseBar": "Missing: bar_sync before the release of block",
    "kHandoffArrive": "has released nothing yet",
    "kStageBar": "Missing: bar_sync (or an mbarrier) between warps",
    "kPartialBar": "Missing: ",
}


@pytest.mark.parametrize("site", list(OFF))
def test_a_site_switched_off_is_found_in_every_schedule(site: str) -> None:
    for seed in SEEDS:
        ring = Ring(seed)
        ring.simulator.switch(site, Mode.OFF)
        found = ring.run()
        assert any(text in found for text in OFF[site]), (seed, found)


@pytest.mark.parametrize("site", list(UNORDERED))
def test_a_site_without_its_ordering_is_found_in_every_schedule(site: str) -> None:
    for seed in SEEDS:
        ring = Ring(seed)
        ring.simulator.switch(site, Mode.UNORDERED)
        found = ring.run()
        assert found.startswith("unordered accesses to "), (seed, found)
        assert UNORDERED[site] in found, (seed, found)


def test_the_release_of_the_announcement_is_not_needed() -> None:
    for seed in SEEDS:  # consumers learn of the copy from the copy's bytes
        ring = Ring(seed)
        ring.simulator.switch("kExpect", Mode.UNORDERED)
        assert ring.run() == ""


def test_a_switch_is_undone() -> None:
    ring = Ring(1)
    ring.simulator.switch("kPhaseBar", Mode.OFF)
    assert ring.run() != ""
    ring.simulator.switch("kPhaseBar", Mode.ON)
    ring.counter[0] = ring.launch.base
    assert ring.run() == ""
    assert ring.correct()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"variation": Ring.RELEASE_PER_GROUP}, "read by block"),
        ({"variation": Ring.CACHED_X}, "ld.global.nc of data written in the launch: block"),
        ({"expect_tx_delta": -16}, "expect_tx is too small: bytes of a bulk copy into shared ring + "),
        ({"expect_tx_delta": 16}, "lacks 0 of 1 arrivals and 16 bytes"),
    ],
)
def test_variations_are_found_in_every_schedule(options: dict[str, int], text: str) -> None:
    for seed in SEEDS:
        found = Ring(seed, **options).run()
        assert text in found, (seed, found)


def test_bytes_that_nobody_expects_are_found_in_every_schedule() -> None:
    for seed in SEEDS:
        found = Ring(seed, expect_tx_delta=-2048).run()
        assert "Missing: mbar_try_wait for phase" in found or "expect_tx is too small" in found, (seed, found)


def test_a_finding_names_both_accesses() -> None:
    ring = Ring(2)
    ring.simulator.switch("kHandoffFence", Mode.OFF)
    found = ring.run()
    for text in ("x + ", "written by block ", "st_global at ring.cpp:", "then by block ", "ld_global at ring.cpp:"):
        assert text in found
    assert "red_relaxed_add at ring.cpp:" in found
    assert "(kHandoffArrive)" in found


def test_a_deadlock_report_says_who_waits_where_for_what() -> None:
    for seed in SEEDS:
        ring = Ring(seed, base=40)
        ring.simulator.switch("kHandoffArrive", Mode.OFF)
        found = ring.run()
        for text in (
            "block 0 warp 0 lanes 0 in ld_acquire at ring.cpp:",
            "(kHandoffPoll): counter + 0, which stays 40",
            "block 2 warp 3 lanes 0-31 in bar_sync at ring.cpp:",
            "barrier 1: 127 of 128 threads came; not all of warps 0, 4",
            "block 1 warp 4 lanes 0 in mbar_try_wait at ring.cpp:",
            "lacks 4 of 4 arrivals and 0 bytes",
        ):
            assert text in found, (seed, found)


FAULTS = {
    "kSharedBeyond": "is out of bounds: st_shared at faults.cpp:",
    "kSharedBelow": "of 4 bytes at shared + -4 of 1024 bytes",
    "kGlobalBeyond": "data + 1024 of 1024 bytes",
    "kConstBeyond": "fixed + 1024 of 1024 bytes",
    "kPrefetchBeyond": "prefetch_l2_bulk at faults.cpp:",
    "kMisaligned": "expected a multiple of 16",
    "kFreshShared": "reads what was never written: shared + 12 of block",
    "kFreshGlobal": "reads what was never written: fresh + 12",
    "kFreshCounter": "reads what was never written: fresh + 0 by red_relaxed_add",
    "kWriteConstant": "writes a region that is constant during the launch: fixed + 0",
    "kLdConstOfChanging": "ld.global.nc of data written in the launch",
    "kCopyOfChanging": "bulk_copy of data written in the launch",
    "kCopyMisaligned": "address and size must be multiples of 16",
    "kCopyUnwaited": "nobody had waited for the last bulk copies",
    "kLanesUnordered": "",
    "kLanesThroughShuffle": "Missing: warp_sync between the lanes of the warp",
    "kSameValueTwice": "Missing: warp_sync between the lanes of the warp",
    "kHalfRead": "",
    "kWarpsUnordered": "Missing: bar_sync (or an mbarrier) between warps",
    "kReadersUnordered": "Missing: bar_sync (or an mbarrier) between warps",
    "kBlocksUnordered": "has released nothing yet",
    "kDifferentMeetings": "lanes of one warp meet in different calls",
    "kBarrierCount": "",
    "kBarrierNotWarps": "whole warps of the block",
    "kBarrierLonely": "barrier 3: 32 of 64 threads came; not all of warps 0",
    "kMbarOverwritten": "overwrites an mbarrier",
    "kMbarRead": "reads an mbarrier as data",
    "kMbarTwice": "initialised before",
    "kMbarMissing": "which is no initialised mbarrier",
    "kArriveTooOften": "once too often",
    "kCounterNever": "counter + 0, which stays 0",
    "kRelaxedNoFence": "Missing: fence_gpu before the release of block 0, st_relaxed",
    "kLastArriverNoFence": "Missing: fence_gpu before the release of block",
    "kLastArriverRelaxedNoFence": "Missing: fence_gpu before the release of block",
    "kLastArriverNoFenceAfter": "unordered accesses to data",
    "kPlainOverAtomic": "unordered accesses to counter + 0",
    "kLaneGone": "lanes 0-4, 6-31 in warp_sync",
    "kBarrierPlaces": "lanes of one warp meet the others in different calls",
    "kAroundWrappers": "written without a wrapper: data + 12",
    "kAfterAbort": "unordered accesses to data + 0",
    "kSpinLimit": ", which stays 0",
}
SOUND = [name for name in names("faults.cpp", "Fault") if name not in (*FAULTS, "kPlainSpin")]


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_mistake_is_found_in_every_schedule(fault: str) -> None:
    for seed in SEEDS:
        found = Faults(fault, seed).run()
        assert found
        assert FAULTS[fault] in found, (seed, found)


@pytest.mark.parametrize("case", SOUND)
def test_what_is_right_passes(case: str) -> None:
    for seed in SEEDS:
        assert Faults(case, seed).run() == "", seed


@pytest.mark.parametrize("case", ["kLastArriver", "kLastArriverRelaxed"])
def test_the_last_to_arrive_sees_all(case: str) -> None:
    for seed in SEEDS:
        faults = Faults(case, seed)
        for _ in range(2):  # the counter was set back
            assert faults.run() == ""
            assert faults.data[128] == 2 * sum(range(64)) + 64
            assert faults.counter[0] == 0


def test_the_spin_limit_of_the_device_can_be_reached() -> None:
    for seed in SEEDS:
        faults = Faults("kSpinLimit", seed, stop_at_deadlock=0)
        assert faults.run() == ""
        assert faults.counter[1] == 1
        assert faults.counter[2] in (100, 101)
        assert faults.simulator.stats().idle > 0


def test_an_endless_launch_ends() -> None:
    assert "did not end within" in Faults("kCounterNever", 1, stop_at_deadlock=0, max_steps=20_000).run()
    for policy in Policy:
        assert "did not end within" in Faults("kPlainSpin", 1, policy=policy, max_calls=2_000_000).run()


def test_after_an_abort_order_is_not_checked() -> None:
    for seed in SEEDS:
        faults = Faults("kAfterAbort", seed)
        faults.simulator.abort_flag(faults.launch.counter)
        assert faults.run() == ""
