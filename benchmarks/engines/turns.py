"""Rounds in which every engine has one turn beside the read probe, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Protocol

from .child import Child
from .pairs import Spread, pair_ratios, spread

PROBE_S = 0.3
PAUSE_S = 0.05  # after a turn, in which threads that wait for more work go to sleep


class Probe(Protocol):
    def gb_s(self, seconds: float) -> float: ...


@dataclass(frozen=True)
class Test:
    """`decode`: `n` greedy tokens after `depth` cached positions. `prefill`: a prompt of `n`, nothing cached."""

    __test__ = False

    kind: str
    depth: int
    n: int

    @property
    def positions(self) -> int:
        return self.depth + self.n + 1

    @property
    def mean_kv(self) -> float:
        """Positions that a token reads, itself included, on average over the test."""
        return self.depth + (self.n + 1) / 2

    def run(self, child: Child) -> tuple[float, list[int]]:
        """Seconds, tokens."""
        asked = {"depth": self.depth} if self.kind == "decode" else {}
        answer = child(self.kind, n=self.n, **asked)
        return answer["ns"] / 1e9, answer["tokens"]


@dataclass
class Turns:
    """Of one engine in one test; entry i of each list is round i."""

    seconds: list[float] = field(default_factory=list)
    of_probe: list[float] = field(default_factory=list)  # 1 / (seconds * mean GB/s of the probes before and after)
    tokens: list[list[int]] = field(default_factory=list)
    on_s: float = 0.0  # wall time of its turns
    on_cpu_s: float = 0.0
    off_share: float = 0.0  # CPUs that it kept busy while it was not its turn

    @property
    def repeats(self) -> bool:
        """Whether every round gave the same tokens."""
        return all(tokens == self.tokens[0] for tokens in self.tokens)

    def rates(self, n: float) -> list[float]:
        return [n / s for s in self.seconds]

    def fraction(self, n_bytes: float) -> float:
        """Median over rounds of the GB/s at which `n_bytes` per turn were read, as a share of the probe's."""
        return spread([n_bytes / 1e9 * share for share in self.of_probe]).median


def take_turns(
    children: Mapping[str, Child], test: Test, probe: Probe, rounds: int, deadline: float, say: Callable[[str], None]
) -> tuple[dict[str, Turns], list[float]]:
    """`rounds` rounds, or fewer if `deadline` (of perf_counter) passes, always whole and at least one; and the probes.

    One turn of each before them warms up and is not counted.
    """
    turns = {name: Turns() for name in children}
    for child in children.values():
        test.run(child)
    sleep(PAUSE_S)
    begin, cpu = perf_counter(), {name: child.cpu_s() for name, child in children.items()}
    probes = [probe.gb_s(PROBE_S)]
    for number in range(1, rounds + 1):
        for name, child in children.items():
            mine, on, on_cpu = turns[name], perf_counter(), child.cpu_s()
            seconds, tokens = test.run(child)
            mine.on_s += perf_counter() - on
            mine.on_cpu_s += child.cpu_s() - on_cpu
            sleep(PAUSE_S)
            probes.append(probe.gb_s(PROBE_S))
            mine.seconds.append(seconds)
            mine.tokens.append(tokens)
            mine.of_probe.append(2 / (seconds * (probes[-2] + probes[-1])))
        if number < rounds and perf_counter() > deadline:
            say(f"the time is over after {number} of {rounds} rounds")
            break
    wall = perf_counter() - begin
    for name, child in children.items():
        mine = turns[name]
        mine.off_share = (child.cpu_s() - cpu[name] - mine.on_cpu_s) / (wall - mine.on_s)
    return turns, probes


def faster(ours: Turns, theirs: Turns) -> Spread:
    """How many times as fast ours was, within rounds."""
    return pair_ratios(theirs.seconds, ours.seconds)
