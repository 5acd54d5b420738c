"""Log probabilities against PyTorch in float64, over logits with ties and extremes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashformer.engine.logprobs import Score, likeliest, token_logprobs

LOGITS = st.lists(st.integers(-6, 6).map(float) | st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)


@given(values=LOGITS, data=st.data())
def test_logprobs(values: list[float], data: st.DataObject) -> None:
    logits = np.array(values, np.float32)
    n, token = data.draw(st.integers(0, min(20, len(values)))), data.draw(st.integers(0, len(values) - 1))
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    found = token_logprobs(logits, token, n)
    best = sorted(range(len(values)), key=lambda i: (-logits[i], i))[:n]
    assert [i for i, _ in found.top] == likeliest(logits, n) == best
    assert [value for _, value in found.top] == pytest.approx(expected[best].tolist(), rel=1e-6, abs=1e-6)
    assert (found.token_id, found.logprob) == (token, pytest.approx(expected[token], rel=1e-6, abs=1e-6))
    assert found.logprob == float(np.float32(found.logprob))


def test_far_from_zero() -> None:
    for shift in (-3e38, 1e9, 3e38):
        found = token_logprobs(np.full(4, shift, np.float32), 2, 2)
        assert found.logprob == pytest.approx(-np.log(4))
        assert [i for i, _ in found.top] == [0, 1]


def test_total_of_a_score() -> None:
    assert Score([1, 2], [-0.5, -1.25], [True, False]).total == -1.75
