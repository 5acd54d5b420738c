"""How far one way of computing a model is from another, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from .engine import LLM

TEXT = "workshop-1"  # a text of ours beside this file, always the same, so that reports can be compared


@dataclass(frozen=True)
class Divergence:
    """Means over positions. `kl`: Kullback-Leibler divergence of the other's next-token distribution, in nats."""

    kl: float
    kl_p99: float
    top1: float  # share of positions with the same likeliest token
    n_tokens: int


def fixed_text() -> str:
    """The text named TEXT: plain English with a little code, about 500 words."""
    return files(__package__).joinpath(f"{TEXT}.txt").read_text("utf-8")


def divergence(original: LLM, other: LLM, ids: Sequence[int]) -> Divergence:
    """Of the distributions after each of `ids`. Raises what `LLM.logits` raises."""
    return divergence_from(original.logits(list(ids)), other, ids)


def divergence_from(logits: NDArray[np.float32], other: LLM, ids: Sequence[int]) -> Divergence:
    """The same with the logits of the original, (n_tokens, vocab_size), so that it need not be loaded any more."""
    kl, same = np.empty(len(ids)), np.empty(len(ids), bool)
    with closing(other.logit_parts(list(ids))) as parts:
        for begin, part in parts:
            at = slice(begin, begin + len(part))
            p, q = _log_probabilities(logits[at]), _log_probabilities(part)
            kl[at] = np.sum(np.exp(p) * (p - q), axis=1)
            same[at] = p.argmax(axis=1) == q.argmax(axis=1)
    return Divergence(float(kl.mean()), float(np.quantile(kl, 0.99)), float(same.mean()), len(ids))


def _log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result
