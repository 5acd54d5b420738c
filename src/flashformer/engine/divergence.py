"""How far one way of computing a model is from another, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .engine import LLM


@dataclass(frozen=True)
class Divergence:
    """Means over positions. `kl`: Kullback-Leibler divergence of the other's next-token distribution, in nats."""

    kl: float
    kl_p99: float
    top1: float  # share of positions with the same likeliest token
    n_tokens: int


def divergence(original: LLM, other: LLM, ids: Sequence[int]) -> Divergence:
    """Of the distributions after each of `ids`. Raises what `LLM.logits` raises."""
    p, q = (_log_probabilities(llm, ids) for llm in (original, other))
    kl = np.sum(np.exp(p) * (p - q), axis=1)
    same = p.argmax(axis=1) == q.argmax(axis=1)
    return Divergence(float(kl.mean()), float(np.quantile(kl, 0.99)), float(same.mean()), len(ids))


def _log_probabilities(llm: LLM, ids: Sequence[int]) -> NDArray[np.float64]:
    logits = llm.logits(list(ids)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return result
