"""Every ordering of the kernel's core is needed: with any site switched off the simulator finds something. And waits
that cannot end do end, with a record of who waited for what."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest
from gpu_on_host.products import BASE, F32Array, Forward, Matrix, Shape, Step, random_matrix
from gpu_on_host.simulator import Mode

from flashformer.program.ir import Op

ROWS, D, D_FF, QKV = 5, 2080, 96, 40

# What is found, as a pattern, where a site has no effect, and where it keeps its effect but orders nothing.
EXPECTED = {
    "kInitFence": ("missing fence_mbar_init", "missing fence_mbar_init"),
    "kInitBar": ("initialised|tokens.cuh", "tokens.cuh"),  # whichever comes first
    "kWaitEmpty": ("kSmem", "kSmemRing"),
    "kProducerFence": ("missing fence_proxy_async", "missing fence_proxy_async"),
    "kExpect": ("deadlock", None),  # what consumers learn is that the bytes have come, and of that the copy tells
    "kWaitFull": ("kSmemRing", "kSmemRing"),
    "kSlotWarp": ("kSmemRing", "kSmemRing"),
    "kSlotRelease": ("deadlock", "kSmemRing"),
    "kHandoffPoll": ("work", "work"),
    "kHandoffBar": ("kSmemSmall", "kSmemSmall"),  # the records, before anything else
    "kPhaseBar": ("work", "work"),
    "kHandoffFence": ("work", "work"),
    "kHandoffArrive": ("deadlock", "work"),
    "kSumsBar": ("kSmemSmall", "kSmemSmall"),
    "kFactorsBar": ("kSmemSmall", "kSmemSmall"),
    "kScaleBar": ("kSmemSmall", "kSmemSmall"),
    "kStageBar": ("kSmem", "kSmem"),
    "kPartialBar": ("kSmemPartial", "kSmemPartial"),
    "kBadBar": ("kSmemSmall", "kSmemSmall"),
}


@cache
def matrices() -> tuple[Matrix, Matrix, F32Array]:
    rng = np.random.default_rng(1)
    down, qkv = random_matrix(rng, "f16", D, D_FF, 2), random_matrix(rng, "f16", QKV, D, 2)
    return down, qkv, np.ones(D, np.float32)


def two_phases(seed: int, n_slots: int = 2, **options: int) -> Forward:
    """down, then qkv of what down left: two slices of k, a hand-off, a norm, f16 slices."""
    down, qkv, norm = matrices()
    steps = [Step(Op.DOWN, down), Step(Op.QKV, qkv, norm=norm)]
    forward = Forward(Shape(ROWS, D, d_ff=D_FF, qkv=QKV), steps, 2, n_slots=n_slots, seed=seed, **options)
    rng = np.random.default_rng(2)
    forward.buffer["residual"][:ROWS, :D] = rng.integers(-4, 5, (ROWS, D))
    forward.buffer["hidden"][:ROWS, :D_FF] = rng.integers(-4, 5, (ROWS, D_FF))
    return forward


def test_the_whole_kernel_is_ordered() -> None:
    first = two_phases(1)
    assert first.run() == ""
    assert {site for site, n in first.simulator.counts().items() if n} == {*EXPECTED, "kDrain"}
    for seed in range(2, 12):
        forward = two_phases(seed)
        assert forward.run() == ""
        np.testing.assert_array_equal(forward.buffer["qkv"], first.buffer["qkv"])


@pytest.mark.parametrize("site", EXPECTED)
@pytest.mark.parametrize("mode", [Mode.OFF, Mode.UNORDERED])
def test_every_site_is_needed(site: str, mode: Mode) -> None:
    expected = EXPECTED[site][mode is Mode.UNORDERED]
    for seed in range(1, 4):
        forward = two_phases(seed)
        forward.simulator.switch(site, mode)
        found = forward.run()
        if expected is None:
            assert found == ""
        else:
            assert re.search(expected, found), found


def test_a_block_waits_for_its_copies() -> None:
    """Without the drain a block whose consumers take less than its tape has would end under its copies."""
    found = []
    for mode in (Mode.ON, Mode.OFF):
        forward = two_phases(1, n_slots=6)
        forward.schedule["end"][1, 1] = forward.schedule["begin"][1, 1]
        forward.simulator.switch("kDrain", mode)
        found.append(forward.run())
    assert found[0] == ""
    assert "nobody had waited" in found[1], found[1]


def aborted(forward: Forward) -> dict[str, int | str]:
    assert forward.run() == ""
    flag, block, phase, site, seen, expected, claims, _ = (int(word) for word in forward.report[:8])
    assert flag == 1
    assert claims >= 1
    return {
        "block": block,
        "phase": phase,
        "site": forward.simulator.sites()[site],
        "seen": (seen - BASE) % 2**32,
        "expected": (expected - BASE) % 2**32,
    }


@pytest.mark.parametrize("seed", range(5))
def test_a_hand_off_that_never_comes(seed: int) -> None:
    forward = two_phases(seed, stop_at_deadlock=0)
    forward.launch["spin_limit"] = 100_000
    forward.schedule["wait"][1] = [7, 8]  # of 2 arrivals that will be there
    record = aborted(forward)
    assert record["block"] in (0, 1)
    assert record == {
        "block": record["block"],
        "phase": 1,
        "site": "kHandoffPoll",
        "seen": 2,
        "expected": 7 + int(record["block"]),
    }


def test_weights_that_never_come() -> None:
    forward = two_phases(1, stop_at_deadlock=0)
    forward.launch["spin_limit"] = 100_000
    forward.tape_begin[2] -= 1
    record = aborted(forward)
    assert (record["block"], record["phase"], record["site"]) == (1, 1, "kWaitFull")


def test_slots_that_are_never_given_back() -> None:
    forward = two_phases(1, stop_at_deadlock=0)
    forward.launch["spin_limit"] = 100_000
    forward.simulator.switch("kSlotRelease", Mode.OFF)
    assert aborted(forward)["site"] in ("kWaitEmpty", "kWaitFull")


@pytest.mark.parametrize("seed", range(8))
def test_after_an_abort_no_slot_is_given_back(seed: int) -> None:
    """More bytes are announced than come. A slot given back unread would be announced again in the same phase."""
    forward = two_phases(seed, n_slots=1, stop_at_deadlock=0, idle_cycles=1 << 30, expect_tx_delta=16)
    forward.launch["spin_limit"] = 100 << 30
    found = forward.run()
    assert forward.simulator.sites()[int(forward.report[3])] == "kWaitFull"
    assert "ended and nobody had waited for the last bulk copies" in found, found
