"""Log probabilities against PyTorch in float64, over logits with ties and extremes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from folders import BOS, model_folder
from hypothesis import given
from hypothesis import strategies as st

import flashformer as ff
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


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(("prompt", "first"), [("", [BOS]), ("  ", [BOS]), ("a ", None)])
def test_the_whole_continuation_is_scored(tmp_path: Path, adds_bos: bool, prompt: str, first: list[int] | None) -> None:
    """Also where the prompt is empty and its tokenizer adds no BOS, which then stands in for it."""
    with ff.load(model_folder(tmp_path, add_bos=adds_bos), device="reference") as llm:
        score = llm.score(prompt, "bcd")
        rest = prompt[len(prompt.rstrip()) :] + "bcd"
        start = first or ([BOS] * adds_bos + llm.tokenizer.encode("a", add_special_tokens=False))
        expected = llm.score(start, llm.tokenizer.encode(rest, add_special_tokens=False))
    assert len(score.logprobs) == len(rest)
    assert score.logprobs == expected.logprobs


def test_total_of_a_score() -> None:
    assert Score([1, 2], [-0.5, -1.25], [True, False]).total == -1.75
