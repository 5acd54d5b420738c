"""Repeat penalty and logit bias of one sequence, kept in its slot's part of the adjust columns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Rows
from .slots import Slot


class Adjustments:
    """Entries [begin, end) of the adjust columns, one per token. Grows by one entry per new token at most.

    The columns are cut into equal parts, one per slot, so what one sequence writes no other reads.
    """

    def __init__(self, rows: Rows, slot: Slot, ids: NDArray[np.int32], penalty: float, bias: Mapping[int, float]):
        """`ids`: the prompt. The penalty applies to every token of prompt and answer, once, as in transformers."""
        self._tokens, self._penalties, self._biases = rows.adjust_token, rows.adjust_penalty, rows.adjust_bias
        self.begin = self.end = slot.index * (len(rows.adjust_token) // slot.n_slots)
        self._penalty = np.float32(penalty)
        self._places: dict[int, int] = {}
        if penalty != 1:
            ids = np.unique(ids)
            self.end += len(ids)
            at = slice(self.begin, self.end)
            self._tokens[at], self._penalties[at], self._biases[at] = ids, self._penalty, 0
            self._places = {token: self.begin + i for i, token in enumerate(ids.tolist())}
        for token, value in bias.items():
            place = self._places.get(token)
            if place is None:
                place = self._add(token, np.float32(1))
            self._biases[place] = value

    def note(self, token: int) -> None:
        """A token was made: from now on the penalty applies to it."""
        if self._penalty == 1:
            return
        place = self._places.get(token)
        if place is None:
            self._add(token, self._penalty)
        else:
            self._penalties[place] = self._penalty

    def _add(self, token: int, penalty: np.float32) -> int:
        place = self.end
        self._tokens[place], self._penalties[place], self._biases[place] = token, penalty, 0
        self._places[token] = place
        self.end += 1
        return place
