"""sample on the simulated GPU: the token of backends/sampling.py, bit for bit, and every ordering needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_on_host.one_phase import OnePhase
from gpu_on_host.simulator import Mode
from numpy.typing import NDArray
from programs import spec

from flashformer.backends import sampling
from flashformer.backends.base import ADJUST_COLUMNS, ROW_COLUMNS, Rows
from flashformer.backends.noise import uniform
from flashformer.formats import BF16
from flashformer.program import Target, build
from flashformer.program.ir import MAX_HEAD_ROWS, Layout, Op, Space

F32 = NDArray[np.float32]
SHAPES = ("peaked", "flat", "ties", "wide")


def fma(a: Any, b: Any, c: Any) -> F32:
    """float32 a * b + c; the product is exact in float64, the sum nearly always rounds as if it were."""
    wide: NDArray[np.float64] = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
    return wide.astype(np.float32)


def native_exp(x: F32) -> F32:
    """The exponential of csrc/phases/math.h, step by step."""
    x = np.clip(x, np.float32(-87.3), np.float32(88))
    n = np.rint(x * np.float32(1.44269504))
    r = fma(n, np.float32(2.12194440e-4), fma(n, np.float32(-0.693359375), x))
    p = np.full_like(x, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, np.float32(c))
    result: F32 = np.ldexp(fma(p, r * r, r) + np.float32(1), n.astype(np.int32)).astype(np.float32)
    return result


def native_log(x: F32) -> F32:
    """The logarithm of csrc/phases/math.h, step by step."""
    shifted = x.view(np.uint32) - np.uint32(0x3F3504F3)
    e = (shifted.view(np.int32) >> 23).astype(np.float32)
    m = ((shifted & 0x007FFFFF) + np.uint32(0x3F3504F3)).view(np.float32) - np.float32(1)
    z, p = m * m, np.full_like(x, 7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
              -2.4999993993e-1, 3.3333331174e-1):  # fmt: skip
        p = p * m + np.float32(c)
    p = p * m * z + e * np.float32(-2.12194440e-4) - np.float32(0.5) * z
    result: F32 = m + p + e * np.float32(0.693359375)
    return result


def native_gumbel(seed: int, choice: int, pos: int, ids: NDArray[np.integer]) -> F32:
    return -native_log(-native_log(uniform(seed, choice, pos, ids)))


class _Numpy:
    """numpy, but for the exponential."""

    exp = staticmethod(native_exp)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@pytest.fixture(autouse=True)
def _same_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition, but with the exponential and the logarithm that native code has."""
    monkeypatch.setattr(sampling, "np", _Numpy())
    monkeypatch.setattr(sampling, "gumbel", native_gumbel)


class Sample:
    def __init__(self, vocab: int, seed: int, n_workers: int = 2, **options: int):
        model = spec(vocab_size=vocab, d_model=32, head_dim=16, n_heads=1, n_kv_heads=1, d_ff=32)
        target = Target(n_workers, BF16, BF16, 16, 16, 256, layout=Layout.FRAGMENTS)
        self.kernel = OnePhase(build(model, target), Op.SAMPLE, seed=seed, **options)
        self.random, self.vocab, self.rows = np.random.default_rng(seed), vocab, Rows(target)
        self.logits = self.kernel.buffer(Space.LOGITS)  # NaN from vocab on
        self.candidates = self.kernel.buffer(Space.CANDIDATES).view(np.uint32).reshape(n_workers, MAX_HEAD_ROWS, 2)
        self.head_rows: list[int] = []
        self._adjusted = 0

    def draw_logits(self, i: int, shape: str) -> None:
        scale = {"peaked": 6.0, "flat": 0.05, "ties": 1.0, "wide": 40.0}[shape]
        logits = self.random.normal(size=self.vocab) * scale
        self.logits[i, : self.vocab] = np.round(logits * 2) / 2 if shape == "ties" else logits

    def draw_row(self, i: int, row: int) -> None:
        """Settings of a row, each off now and then."""
        rows, random = self.rows, self.random

        def maybe(value: float, off: float) -> float:
            return value if random.random() < 0.6 else off

        rows.temperature[row] = 0 if random.random() < 0.15 else random.uniform(0.1, 3)
        rows.top_k[row] = int(maybe(int(random.integers(1, self.vocab // 2)), 0))
        rows.top_p[row], rows.min_p[row] = maybe(random.uniform(0.01, 1), 1), maybe(random.uniform(0, 0.3), 0)
        rows.seed[row], rows.choice[row], rows.pos[row] = (
            random.integers(2**63),
            random.integers(9),
            random.integers(99),
        )
        if random.random() < 0.5:
            self.adjust(row, random.permutation(self.vocab)[: random.integers(1, 400)])

    def adjust(self, row: int, ids: NDArray[np.integer]) -> None:
        begin, end = self._adjusted, self._adjusted + len(ids)
        self.rows.adjust_begin[row], self.rows.adjust_end[row], self._adjusted = begin, end, end
        self.rows.adjust_token[begin:end] = ids
        self.rows.adjust_penalty[begin:end] = self.random.uniform(0.5, 2, len(ids))
        self.rows.adjust_bias[begin:end] = self.random.normal(size=len(ids))

    def draw_candidates(self, i: int) -> None:
        """Of a row that needs no logits; scores are often equal, and some blocks have none."""
        scores = self.random.integers(-3, 3, len(self.candidates)).astype(np.float32)
        tokens = self.random.permutation(self.vocab)[: len(self.candidates)].astype(np.int32)
        tokens[1:] = np.where(self.random.random(len(tokens) - 1) < 0.3, -1, tokens[1:])
        self.candidates[:, i, 0], self.candidates[:, i, 1] = scores.view(np.uint32), tokens.view(np.uint32)

    def expected(self, i: int, row: int) -> int:
        if sampling.chooses_from_logits(self.rows, row):
            return sampling.choose(self.rows, row, self.logits[i, : self.vocab])
        scores, tokens = self.candidates[:, i, 0].view(np.float32), self.candidates[:, i, 1].view(np.int32)
        there = tokens >= 0
        return int(tokens[there & (scores == scores[there].max())].min())

    def run(self) -> str:
        launch = self.kernel.launch[0]
        launch["n_rows"], launch["n_head_rows"] = 16, len(self.head_rows)
        launch["head_row"][: len(self.head_rows)] = self.head_rows
        for name in ROW_COLUMNS:
            launch[name][:] = getattr(self.rows, name)[:16]
        for name in ADJUST_COLUMNS:
            column = self.kernel.adjust[name.removeprefix("adjust_")]
            column[:] = getattr(self.rows, name)[: len(column)]
        return self.kernel.run()

    def check(self) -> None:
        """The tokens are the definition's, and the logits what they were."""
        before = self.logits.copy()
        expected = [self.expected(i, row) for i, row in enumerate(self.head_rows)]
        assert self.run() == ""
        tokens = self.kernel.buffer(Space.TOKENS, np.int32)
        assert tokens[: len(expected)].tolist() == self.kernel.results[: len(expected)].tolist() == expected
        assert np.array_equal(before.view(np.uint32), self.logits.view(np.uint32))


@pytest.mark.parametrize("vocab", [97, 333, 5000])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_the_definitions(vocab: int, shape: str, seed: int) -> None:
    sample = Sample(vocab, seed + 1, n_workers=1 + seed)
    sample.head_rows = sorted(sample.random.permutation(16)[: 3 + seed].tolist())
    for i, row in enumerate(sample.head_rows):
        sample.draw_logits(i, shape)
        sample.draw_row(i, row)
        sample.draw_candidates(i)
    sample.check()


@pytest.mark.parametrize(
    ("shape", "temperature", "top_k", "top_p"),
    [
        ("flat", 1.0, 0, 0.999),  # no list is long enough: all tokens are looked at again and again
        ("flat", 1.0, 0, 0.01),
        ("peaked", 1.0, 0, 0.9),
        ("peaked", 0.3, 15000, 1.0),
        ("ties", 1.0, 5, 1.0),  # the cut falls among equals
        ("ties", 1.0, 3000, 0.5),
        ("wide", 0.5, 1, 1.0),
        ("wide", 3.0, 12, 0.3),
    ],
)
def test_many_tokens(shape: str, temperature: float, top_k: int, top_p: float) -> None:
    """Lists that overflow, or are too short at first."""
    sample = Sample(20000, 5, n_workers=1)
    sample.head_rows = [3]
    sample.draw_logits(0, shape)
    rows = sample.rows
    rows.temperature[3], rows.top_k[3], rows.top_p[3], rows.seed[3] = temperature, top_k, top_p, 99
    for seed in range(3):
        rows.seed[3] = seed
        sample.check()


def test_equal_scores_fall_to_the_lowest_ids() -> None:
    """All logits are one number, of both signs if it is zero: the cut is by id alone."""
    sample = Sample(333, 1, n_workers=1)
    sample.head_rows = [0, 1]
    sample.logits[0, :333], sample.logits[1, :333] = 2.5, 0.0
    sample.logits[1, :333:2] = -0.0
    for row, k in ((0, 7), (1, 100)):
        sample.rows.temperature[row], sample.rows.top_k[row] = 1, k
    kept = [sampling.kept(sample.rows, row, sample.logits[row, :333]) for row in (0, 1)]
    assert [np.flatnonzero(k).tolist() for k in kept] == [list(range(7)), list(range(100))]
    for seed in range(20):
        sample.rows.seed[:2] = seed
        sample.check()


def test_a_token_does_not_depend_on_schedules_or_workers() -> None:
    found = set()
    for n_workers, seed in ((1, 1), (1, 2), (3, 3), (8, 4)):
        sample = Sample(3000, 7, n_workers=n_workers)
        sample.kernel.simulator.option(seed=seed)
        sample.head_rows = [2, 5]
        for i, row in enumerate(sample.head_rows):
            sample.draw_logits(i, "peaked")
            sample.rows.temperature[row], sample.rows.top_p[row], sample.rows.seed[row] = 0.9, 0.95, 4
        assert sample.run() == ""
        found.add(tuple(sample.kernel.buffer(Space.TOKENS, np.int32)[:2].tolist()))
    assert len(found) == 1


SITES = ("kChooseSum", "kChooseMax", "kChooseBest", "kSampleAdjusted", "kSampleUnit")


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.UNORDERED])
@pytest.mark.parametrize("site", SITES)
def test_every_ordering_is_needed(site: str, mode: Mode) -> None:
    """One block takes three rows, one after the other; the last two need no logits."""
    sample = Sample(600, 3, n_workers=1)
    sample.head_rows = [0, 1, 2]
    sample.draw_logits(0, "flat")
    sample.rows.temperature[0], sample.rows.top_k[0], sample.rows.top_p[0] = 1, 50, 0.9
    sample.adjust(0, np.arange(1, 400))
    for row in (1, 2):
        sample.draw_candidates(row)
    sample.check()
    assert sample.kernel.simulator.counts()[site] > 0
    sample.kernel.simulator.switch(site, mode)
    finding = sample.run()
    assert "unordered accesses" in finding or "never written" in finding, finding
    assert ("to work" if site == "kSampleAdjusted" else "shared") in finding, finding
