"""The noise that makes a temperature: Gumbel-max over counter-based random numbers. The definition for all backends.

The token with the largest `logit / temperature + gumbel` is a sample of softmax(logits / temperature). Noise depends
on (seed, choice, position, token id) and on nothing else, so it is the same in any batch, chunk and backend.

Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox4x32(counter: U32, key: tuple[int, int]) -> U32:
    """(..., 4) counters and a key of two 32-bit words -> (..., 4) random words."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        left, right = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1 = (right >> np.uint64(32)) ^ c1 ^ np.uint64(k0), right & np.uint64(MASK)
        c2, c3 = (left >> np.uint64(32)) ^ c3 ^ np.uint64(k1), left & np.uint64(MASK)
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def uniform(seed: int, choice: int, pos: int, token_ids: NDArray[np.integer]) -> NDArray[np.float32]:
    """(n) numbers in (0, 1), exact in float32: (x >> 9) + 1/2 has 24 bits, times 2^-23.

    counter = (token_id >> 2, pos, choice, 0), key = (low, high 32 bits of seed), word token_id & 3 of the four.
    """
    ids = token_ids.astype(np.uint32)
    counter = np.zeros((len(ids), 4), np.uint32)
    counter[:, 0], counter[:, 1], counter[:, 2] = ids >> 2, pos, choice
    words = philox4x32(counter, (seed & MASK, seed >> 32))
    word = words[np.arange(len(ids)), ids & 3]
    result: NDArray[np.float32] = ((word >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return result


def gumbel(seed: int, choice: int, pos: int, token_ids: NDArray[np.integer]) -> NDArray[np.float32]:
    """(n) Gumbel noise -log(-log(u)). Native code takes its own float32 logarithm; it may differ in the last bits."""
    u = uniform(seed, choice, pos, token_ids).astype(np.float64)
    return (-np.log(-np.log(u))).astype(np.float32)
