"""Choosing a token: native code against the definition, the definition against transformers and a float64 softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cpu_kernels import ISAS, cpu_kernel
from numpy.typing import NDArray
from odd_shapes import random_ids
from tiny import Tiny, put, tiny
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashformer.backends.base import Kernel, Rows, Want
from flashformer.backends.sampling import adjusted, choose, kept
from flashformer.errors import RequestError
from flashformer.formats import F32
from flashformer.program.ir import MAX_HEAD_ROWS, Target

VOCAB = 333


def a_model() -> Tiny:
    return tiny(3, vocab_size=VOCAB, scale=0.4)


def draw(rng: np.random.Generator) -> dict[str, Any]:
    """Settings of one row; each is off now and then."""

    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.6 else off

    return {
        "temperature": maybe(float(rng.uniform(0.1, 3)), 1.0),
        "top_k": int(maybe(float(rng.integers(1, 2 * VOCAB)), 0)),
        "top_p": maybe(float(rng.uniform(0.01, 1)), 1),
        "min_p": maybe(float(rng.uniform(0, 0.3)), 0),
        "seed": int(rng.integers(2**63)),
    }


def apply(rows: Rows, row: int, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        getattr(rows, name)[row] = value


def adjust(rows: Rows, row: int, begin: int, ids: list[int], penalty: float, bias: NDArray[np.float32] | float) -> int:
    end = begin + len(ids)
    rows.adjust_begin[row], rows.adjust_end[row] = begin, end
    rows.adjust_token[begin:end], rows.adjust_penalty[begin:end], rows.adjust_bias[begin:end] = ids, penalty, bias
    return end


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_workers", [1, 3])
def test_native_equals_the_definition(isa: str | None, n_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's token is the definition's for the kernel's own logits, which come back unchanged."""
    if isa is not None:
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
    rng = np.random.default_rng(n_workers)
    differ = total = 0
    with cpu_kernel(a_model(), n_workers=n_workers) as kernel:
        rows = kernel.rows
        for trial in range(60):
            ids = random_ids(trial, MAX_HEAD_ROWS, VOCAB)
            put(kernel, 0, ids, pos=0, slot=0, want=Want.LOGITS)
            kernel.forward(len(ids))
            plain = kernel.logits[: len(ids)].copy()
            end = 0
            for row in range(MAX_HEAD_ROWS):
                apply(rows, row, draw(rng))
                if rng.random() < 0.3:
                    rows.temperature[row] = 0
                if rng.random() < 0.5:
                    some = rng.permutation(VOCAB)[: int(rng.integers(1, 30))].tolist()
                    end = adjust(rows, row, end, some, float(rng.uniform(0.5, 2)), float(rng.normal()))
            kernel.forward(len(ids))
            assert np.array_equal(kernel.logits[: len(ids)], plain)
            expected = [choose(rows, row, plain[row]) for row in range(MAX_HEAD_ROWS)]
            differ += sum(int(a) != b for a, b in zip(kernel.tokens, expected, strict=True))
            total += MAX_HEAD_ROWS
    assert differ <= total // 300, "native exp and log may differ in the last bit, and turn a token now and then"


def test_a_row_is_chosen_alike_in_any_company() -> None:
    settings = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 5}
    found = set()
    for n_workers in (1, 2, 4):
        with cpu_kernel(a_model(), n_workers=n_workers, streams=3) as kernel:
            for beside in (0, 2):
                put(kernel, 0, [7, 8, 9], pos=0, slot=0, want=Want.TOKEN)
                for other in range(beside):
                    put(kernel, 3 + other, [other], pos=0, slot=1 + other, want=Want.TOKEN)
                    apply(kernel.rows, 3 + other, settings | {"seed": other})
                apply(kernel.rows, 2, settings)
                adjust(kernel.rows, 2, 0, [7, 8, 9], 1.2, 0)
                kernel.forward(3 + beside)
                found.add(int(kernel.tokens[2]))
    assert len(found) == 1


def rows_of(settings: dict[str, Any], streams: int = 1) -> Rows:
    rows = Rows(Target(1, F32, F32, 16, streams, 64))
    apply(rows, 0, settings)
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_what_is_left_is_what_transformers_leaves(seed: int) -> None:
    """The same penalties and biases, and the same set of tokens after all warpers."""
    rng = np.random.default_rng(seed)
    settings = draw(rng)
    rows = rows_of(settings)
    logits = (rng.standard_normal(VOCAB) * rng.uniform(0.5, 6)).astype(np.float32)
    seen = rng.permutation(VOCAB)[:20].tolist()
    penalty = float(rng.uniform(0.6, 1.8))
    adjust(rows, 0, 0, seen, penalty, 0)
    warpers = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(settings["temperature"])]
    warpers += [TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []
    warpers += [TopPLogitsWarper(settings["top_p"])] if settings["top_p"] < 1 else []
    warpers += [MinPLogitsWarper(settings["min_p"])] if settings["min_p"] else []
    theirs = LogitsProcessorList(warpers)(torch.tensor([seen]), torch.tensor(logits)[None])[0].numpy()
    scores = adjusted(rows, 0, logits) / rows.temperature[0]
    left = kept(rows, 0, scores)
    assert left.any()
    assert np.array_equal(left, np.isfinite(theirs))
    np.testing.assert_allclose(scores[left], theirs[left], rtol=1e-6)


def test_ties_go_to_the_lower_id() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[100:] = 1
    assert np.flatnonzero(kept(rows_of({"temperature": 1, "top_k": 5}), 0, logits)).tolist() == list(range(100, 105))
    assert np.flatnonzero(kept(rows_of({"temperature": 1, "top_p": 1e-6}), 0, logits)).tolist() == [100]
    assert choose(rows_of({"temperature": 0}), 0, logits) == 100


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 0.95},
        {"temperature": 0.7, "top_k": 12},
        {"temperature": 1.6, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.0, "bias": 1.5},
    ],
)
def test_frequencies_are_those_of_a_float64_softmax(settings: dict[str, Any]) -> None:
    """Chi-square over 6,000 native samples of one row; 16 rows per forward, every seed another."""
    vocab = 61
    model = tiny(5, vocab_size=vocab, scale=0.4)
    bias = settings.get("bias", 0.0)
    rows_settings = {k: v for k, v in settings.items() if k != "bias"}
    counts = np.zeros(vocab, np.int64)
    with cpu_kernel(model, n_workers=2, streams=16, ctx=16) as kernel:
        for trial in range(6000 // MAX_HEAD_ROWS):
            _same_row_sixteen_times(kernel, rows_settings, bias, trial)
            kernel.forward(MAX_HEAD_ROWS)
            counts += np.bincount(kernel.tokens, minlength=vocab)
        logits = kernel.logits[0].astype(np.float64)
    logits[:10] += bias
    scores = logits / settings["temperature"]
    probability = np.exp(scores - scores.max())
    probability *= kept(rows_of(rows_settings), 0, scores.astype(np.float32))
    probability /= probability.sum()
    assert counts[probability == 0].sum() == 0
    expected = probability * counts.sum()
    common = expected >= 5
    observed, wanted = counts[common].astype(np.float64), expected[common]
    rest = [counts[~common].sum()], [expected[~common].sum()]
    observed, wanted = np.append(observed, rest[0]), np.append(wanted, rest[1])
    statistic = float(np.sum((observed - wanted) ** 2 / np.maximum(wanted, 1e-12)))
    degrees = len(wanted) - 1
    assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 10, (statistic, degrees)


def _same_row_sixteen_times(kernel: Kernel, settings: dict[str, Any], bias: float, trial: int) -> None:
    end = 0
    for row in range(MAX_HEAD_ROWS):
        put(kernel, row, [3], pos=0, slot=row, want=Want.LOGITS if row == 0 else Want.TOKEN)
        apply(kernel.rows, row, settings | {"seed": trial * MAX_HEAD_ROWS + row})
        if bias:
            end = adjust(kernel.rows, row, end, list(range(10)), 1.0, bias)


BAD_ROWS = [
    {"top_k": -1},
    {"top_p": 0},
    {"top_p": 1.5},
    {"top_p": np.nan},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"temperature": np.inf},
    {"adjust_begin": 3, "adjust_end": 2},
    {"adjust_begin": -1, "adjust_end": 2},
    {"adjust_end": 10**6},
    {"adjust_end": 1, "adjust_token": VOCAB},
    {"adjust_end": 1, "adjust_token": -1},
    {"adjust_end": 1, "adjust_penalty": 0.0},
    {"adjust_end": 1, "adjust_penalty": np.nan},
    {"adjust_end": 1, "adjust_bias": np.inf},
    {"adjust_end": 2},  # token 0 twice
]


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_native_code_refuses_what_the_engine_should_have(bad: dict[str, Any]) -> None:
    with cpu_kernel(a_model()) as kernel:
        put(kernel, 0, [1], pos=0, slot=0, want=Want.TOKEN)
        kernel.rows.adjust_penalty[:] = 1
        for name, value in bad.items():
            getattr(kernel.rows, name)[0] = value
        if bad == {"adjust_end": 2}:
            kernel.forward(1)  # harmless, so not looked for on every token
            return
        with pytest.raises(RequestError, match="row 0"):
            kernel.forward(1)


def test_rows_may_not_share_adjustments() -> None:
    with cpu_kernel(a_model()) as kernel:
        put(kernel, 0, [1, 2], pos=0, slot=0, want=Want.TOKEN)
        adjust(kernel.rows, 0, 0, [5, 6], 1.1, 0)
        adjust(kernel.rows, 1, 1, [7, 8], 1.1, 0)
        with pytest.raises(RequestError, match="row 1: adjustments"):
            kernel.forward(2)
