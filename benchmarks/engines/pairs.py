"""What a comparison is made of: medians with their spread, ratios of pairs within a round, closeness of logits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

# Most of the reference's information that a format may lose, KL(reference, engine) / KL(reference, uniform): how far
# random weights, where no value is easy to round, come out, with room. Unrelated logits lose more than 1.
MOST_LOST = {"bf16": 0.01, "int8": 0.02, "int4": 0.8}


@dataclass(frozen=True)
class Spread:
    median: float
    min: float
    max: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def spread(values: list[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def pair_ratios(ours: list[float], theirs: list[float]) -> Spread:
    """Of two engines that took turns: entry i of both is round i."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def within(ours: int, theirs: int, share: float = 0.02) -> bool:
    """Whether both read the same number of bytes per token but for `share` of the larger."""
    return abs(ours - theirs) <= share * max(ours, theirs)


@dataclass(frozen=True)
class Closeness:
    """Of logits to those of a reference, over all positions; see `compare`."""

    kl: float  # mean over positions, nats
    lost: float
    cosine: float  # least of any position, of logits less their mean
    top1: float  # share of positions

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def compare(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> Closeness:
    """Both (positions, vocabulary). A NaN anywhere gives a `lost` of infinity."""
    p, q = _log_softmax(reference), _log_softmax(logits)
    kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    known = float((np.exp(p) * (p + np.log(p.shape[1]))).sum(axis=1).mean())
    a, b = (x - x.mean(axis=1, keepdims=True, dtype=np.float64) for x in (logits, reference))
    cosine = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    if not np.isfinite(logits).all():
        return Closeness(float("inf"), float("inf"), 0.0, 0.0)
    top1 = float((logits.argmax(axis=1) == reference.argmax(axis=1)).mean())
    return Closeness(kl, kl / known, float(cosine.min()), top1)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    shifted: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return shifted
