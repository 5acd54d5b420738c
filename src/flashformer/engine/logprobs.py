"""Log probabilities of the model's own distribution: of logits before penalties, bias and temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms, computed in float64 and rounded to float32."""

    token_id: int
    logprob: float  # of the token that was chosen
    top: list[tuple[int, float]]  # (token id, log probability) of the likeliest, best first, ties by id


@dataclass(frozen=True)
class Score:
    """What a model makes of a given continuation, one entry per token of it."""

    token_ids: list[int]
    logprobs: list[float]  # natural logarithms
    is_greedy: list[bool]  # whether greedy decoding would have taken the token

    @property
    def total(self) -> float:
        """Log probability of the whole continuation."""
        return math.fsum(self.logprobs)


def logprobs_of(logits: NDArray[np.float32], ids: Sequence[int]) -> list[float]:
    """Log probabilities of some tokens, of (vocab_size) logits."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    chosen = shifted[ids]
    chosen -= np.log(np.exp(shifted, out=shifted).sum())
    found: list[float] = chosen.astype(np.float32).tolist()
    return found


def token_logprobs(logits: NDArray[np.float32], token_id: int, n_top: int) -> TokenLogprobs:
    """Of (vocab_size) logits, with 0 <= n_top <= vocab_size."""
    best = likeliest(logits, n_top)
    own, *top = logprobs_of(logits, [token_id, *best])
    return TokenLogprobs(token_id, own, list(zip(best, top, strict=True)))


def likeliest(logits: NDArray[np.float32], n: int) -> list[int]:
    """The ids of the `n` largest of (vocab_size) logits, best first, ties by id."""
    if n == 0:
        return []
    least = np.partition(logits, len(logits) - n)[len(logits) - n]
    ids = np.flatnonzero(logits >= least)  # more than n where several are equal to the least
    order = np.lexsort((ids, -logits[ids]))[:n]
    found: list[int] = ids[order].tolist()
    return found
