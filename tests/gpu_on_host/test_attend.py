"""attend on the simulated GPU: against float64, the same bits however the work is cut, and every ordering needed."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from gpu_on_host.attention import F32, Attention, Case
from gpu_on_host.one_phase import Group
from gpu_on_host.simulator import Mode, Policy

from flashformer.model.spec import QkNorm
from flashformer.program.ir import Space

CASES = {
    "hd 16": Case(head_dim=16, n_heads=2, n_kv_heads=2, qk_norm=QkNorm.HEAD),
    "hd 14, no rope": Case(head_dim=14, n_heads=3, n_kv_heads=1, rotary=0),
    "hd 40": Case(head_dim=40, n_heads=4, n_kv_heads=4, kv="f16", rotary=10),
    "hd 64": Case(head_dim=64, n_heads=8, n_kv_heads=2),
    "hd 64, window 1": Case(head_dim=64, window=1),
    "hd 80, window 7": Case(head_dim=80, n_heads=7, n_kv_heads=1, window=7, qk_norm=QkNorm.WIDTH),
    "hd 128": Case(head_dim=128, n_heads=8, n_kv_heads=2, kv="f16", qk_norm=QkNorm.HEAD),
    "hd 128, window 300": Case(head_dim=128, n_heads=2, n_kv_heads=1, window=300),
    "hd 256, softcap": Case(head_dim=256, n_heads=2, n_kv_heads=1, window=300, softcap=5.0),
    "hd 96, width": Case(head_dim=96, n_heads=4, n_kv_heads=2, rotary=48, qk_norm=QkNorm.WIDTH, softcap=20.0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def attended(case: Case, known: list[int], groups: list[Group], **options: int) -> list[F32]:
    attention = Attention(case, known, **options)
    assert attention.run(groups) == ""
    assert not attention.kernel.buffer(Space.MERGES, np.int32).any()  # ready for the next layer
    return attention.result(groups)


@cases
@pytest.mark.parametrize("pos", [0, 249, 255, 256, 257, 600])
def test_attention_is_the_truth(case: Case, pos: int) -> None:
    """Rows that cross chunk borders beside rows of other slots, with NaN in the cache beyond what may be read."""
    attention = Attention(case, [pos, 0, 300], seed=pos + 1)
    groups = [Group(0, pos, 5), Group(2, 300, 1), Group(1, 0, 2)]
    assert attention.run(groups) == ""
    attention.check(groups, attention.result(groups))


@cases
def test_the_cache_holds_what_was_appended(case: Case) -> None:
    """Keys and values as rounded, zero beyond head_dim; what came before stays, bit for bit."""
    attention = Attention(case, [253])
    before = [attention.cached(0, pos) for pos in range(253)]
    assert attention.run([Group(0, 253, 8)]) == ""
    for pos, (key, value) in enumerate(before):
        again = attention.cached(0, pos)
        assert np.array_equal(key, again[0])
        assert np.array_equal(value, again[1])
    for pos in range(253, 261):
        heads = attention.heads[0, pos, case.n_heads :]
        for found, expected in zip(attention.cached(0, pos), np.split(heads, 2), strict=True):
            step = np.abs(expected) * 2.0 ** (-8 if case.kv == "bf16" else -10)  # may round the other way
            assert (np.abs(found[:, : case.head_dim] - expected) <= step + 1e-6).all()
            assert (found[:, case.head_dim :] == 0).all()


@cases
def test_the_bits_do_not_depend_on_workers_schedules_or_company(case: Case) -> None:
    pos, expected = 510, None
    for n_workers, n_rows in ((1, 8), (2, 16), (5, 8), (2, 1)):
        for policy, company in ((Policy.RANDOM, []), (Policy.PRIORITY, [Group(1, 255, 3)])):
            some = replace(case, n_workers=n_workers, n_rows=n_rows)
            found = attended(some, [pos, 255], [*company, Group(0, pos, 4)], policy=policy)[-1]
            expected = found if expected is None else expected
            assert np.array_equal(found, expected), (n_workers, policy, company)


@cases
def test_the_bits_do_not_depend_on_how_a_prompt_was_cut(case: Case) -> None:
    """From 250 to 266 in forwards of 1, 7 and 16 rows, over the border of a chunk."""
    begin, end, expected = 250, 266, None
    for chunk in (1, 7, 16):
        attention = Attention(replace(case, n_rows=16), [begin])
        rows = []
        for pos in range(begin, end, chunk):
            groups = [Group(0, pos, min(chunk, end - pos))]
            assert attention.run(groups) == ""
            rows += attention.result(groups)
        found = np.concatenate(rows)
        expected = found if expected is None else expected
        assert np.array_equal(found, expected), chunk


def test_more_columns_than_memory_holds() -> None:
    """16 rows of 32 heads that share a kv head: the unit goes over its keys several times."""
    case = Case(head_dim=32, n_heads=32, n_kv_heads=1, n_rows=16, n_workers=2)
    groups = [Group(0, 250, 16)]
    attention = Attention(case, [250])
    assert attention.run(groups) == ""
    attention.check(groups, attention.result(groups))
    assert attention.kernel.simulator.counts()["kQueryBar"] > 2 * 256, "one pass was enough: ask for more columns"


def test_many_chunks_are_merged_in_turns() -> None:
    case = Case(head_dim=80, n_heads=4, n_kv_heads=2, ctx=4608, streams=1, n_workers=3)
    pos = 17 * 256 - 1  # the second row sees a chunk more than the first
    attention = Attention(case, [pos])
    assert attention.run([Group(0, pos, 2)]) == ""
    attention.check([Group(0, pos, 2)], attention.result([Group(0, pos, 2)]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("what", ["query", "key"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_score_that_is_not_finite_is_not_hidden(bad: float, what: str, softcap: float | None) -> None:
    """It is NaN in every row that sees it, and in no other."""
    case = Case(rotary=0, softcap=softcap)
    attention = Attention(case, [600])
    head, kv_head, groups = 3, 1, [Group(0, 600, 4)]
    attention.projected[0, 602, head if what == "query" else case.n_heads + kv_head, 5] = bad
    assert attention.run(groups) == ""
    wrong = np.isnan(attention.result(groups)[0]).all(axis=-1)  # (rows, heads)
    expected = np.zeros_like(wrong)
    if what == "query":
        expected[2, head] = True
    else:
        expected[2:, 2 * kv_head : 2 * kv_head + 2] = True
    assert np.array_equal(wrong, expected)


# What the simulator says once a site orders nothing, and once it does not even meet.
UNORDERED = {
    "kQkFactorsBar": "unordered accesses to shared",
    "kQueryBar": "unordered accesses to shared",
    "kScoresBar": "unordered accesses to shared",
    "kWeightsWarp": "between the lanes of the warp",
    "kWeightsBar": "unordered accesses to shared",
    "kPartsBar": "unordered accesses to shared",
    "kMergeStored": "unordered accesses to work",
    "kMergeFence": "Missing: fence_gpu",
    "kMergeArrive": "Missing: release",
    "kMergeSeen": "unordered accesses to work",
    "kMergeWarp": "between the lanes of the warp",
    "kMergeBar": "unordered accesses to shared",
}


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.UNORDERED])
@pytest.mark.parametrize("site", UNORDERED)
def test_every_ordering_is_needed(site: str, mode: Mode) -> None:
    case = Case(head_dim=40, n_heads=6, n_kv_heads=2, qk_norm=QkNorm.WIDTH, streams=2)
    attention = Attention(case, [510, 3])
    attention.kernel.simulator.switch(site, mode)
    finding = attention.run([Group(0, 510, 4), Group(1, 3, 2)])
    assert re.search(UNORDERED[site] + ("|never written|unordered accesses" if mode is Mode.OFF else ""), finding)
