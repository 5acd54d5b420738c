"""The noise of temperatures: published answers of Philox, and the distribution that it has to give."""

from __future__ import annotations

import numpy as np
import pytest

from flashformer.backends.noise import gumbel, philox4x32, uniform

# From the known-answer file of Random123 1.14, philox4x32 with 10 rounds: counter, key, result.
ANSWERS = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), ANSWERS)
def test_philox_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    assert philox4x32(np.array(counter, np.uint32), key).tolist() == expected


def test_word_and_counter_of_a_token() -> None:
    seed, choice, pos = 0x0123456789ABCDEF, 3, 77
    ids = np.array([0, 5, 6, 1023, 128_255])
    for token_id, u in zip(ids.tolist(), uniform(seed, choice, pos, ids), strict=True):
        word = philox4x32(np.array([token_id // 4, pos, choice, 0], np.uint32), (0x89ABCDEF, 0x01234567))[token_id % 4]
        assert float(u) == ((int(word) >> 9) + 0.5) / 2**23  # exact: nothing was rounded


def test_every_part_of_the_key_matters() -> None:
    ids = np.arange(64)
    draws = [uniform(*key, ids) for key in ((1, 0, 0), (2, 0, 0), (1 + 2**32, 0, 0), (1, 1, 0), (1, 0, 1))]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert (a != b).mean() > 0.9


def test_extremes_stay_finite() -> None:
    smallest, largest = np.float32(0.5 * 2.0**-23), np.float32((2**23 - 0.5) * 2.0**-23)
    assert smallest > 0
    assert largest < 1
    assert np.isfinite(gumbel(0, 0, 0, np.arange(100_000))).all()


def test_largest_noisy_logit_samples_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03]))
    n = 4000
    winners = [int(np.argmax(logits + gumbel(9, 0, pos, np.arange(5)))) for pos in range(n)]
    found, expected = np.bincount(winners, minlength=5), n * np.exp(logits)
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 23.5  # 4 degrees of freedom: exceeded once in 10,000 seeds; this seed is fixed
