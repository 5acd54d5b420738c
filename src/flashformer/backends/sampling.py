"""How a token is chosen from a row of logits: the definition for all backends.

In the order of transformers' warpers: repetition penalty and bias, temperature, top-k, top-p, min-p; then Gumbel-max
over what is left. Tokens are ordered by score, equal ones by id. The mass of a token is the integer
floor(2^40 exp(score - max)), so that no order of addition decides where a cut falls.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .base import Rows
from .noise import gumbel

MASS_UNIT = np.float32(2.0**40)

F32Array = NDArray[np.float32]


def chooses_from_logits(rows: Rows, row: int) -> bool:
    """Whether a row needs all its logits; otherwise the best candidates of the workers are enough."""
    filters = rows.top_k[row] > 0 or rows.top_p[row] < 1 or rows.min_p[row] > 0
    return bool(rows.adjust_begin[row] < rows.adjust_end[row] or (rows.temperature[row] > 0 and filters))


def adjusted(rows: Rows, row: int, logits: F32Array) -> F32Array:
    """(vocab_size) logits with the row's penalties and biases; a penalty divides what is positive."""
    at = slice(rows.adjust_begin[row], rows.adjust_end[row])
    ids, penalty = rows.adjust_token[at], rows.adjust_penalty[at]
    result = logits.copy()
    result[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty) + rows.adjust_bias[at]
    return result


def kept(rows: Rows, row: int, scores: F32Array) -> NDArray[np.bool_]:
    """(vocab_size) the tokens that top-k, top-p and min-p leave, of scores already divided by the temperature."""
    exps = np.exp(scores - scores.max())
    order = np.lexsort((np.arange(len(scores)), -scores))  # best first
    n = int(rows.top_k[row])
    order = order[:n] if n > 0 else order
    if rows.top_p[row] < 1:
        mass = (exps[order] * MASS_UNIT).astype(np.uint64)
        need = max(int(float(mass.sum()) * float(rows.top_p[row])), 1)
        order = order[: int(np.searchsorted(np.cumsum(mass), need)) + 1]
    result = np.zeros(len(scores), np.bool_)
    result[order] = True
    result &= exps >= rows.min_p[row]
    return result


def choose(rows: Rows, row: int, logits: F32Array) -> int:
    """The token of a row, from its (vocab_size) logits."""
    scores = adjusted(rows, row, logits)
    if rows.temperature[row] > 0:
        scores = scores / rows.temperature[row]
        ids = np.flatnonzero(kept(rows, row, scores))
        seed, choice, pos = int(rows.seed[row]), int(rows.choice[row]), int(rows.pos[row])
        noisy = scores[ids] + gumbel(seed, choice, pos, ids)
        return int(ids[noisy.argmax()])
    return int(scores.argmax())
