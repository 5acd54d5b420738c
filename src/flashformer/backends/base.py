"""What every backend gives the engine: a Kernel that runs one forward over rows of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ..program.ir import Program


class Want(IntEnum):
    """What a row asks of the forward."""

    NOTHING = 0
    TOKEN = 1
    LOGITS = 2  # logits and, as they are there, the token too


class Rows:
    """The rows of one forward, filled in place by the engine; the first `n` given to `forward` count.

    Rows of one slot are adjacent and have consecutive positions; positions below the first are in the
    slot's KV cache already. At most MAX_HEAD_ROWS rows want something.
    """

    def __init__(self, capacity: int) -> None:
        self.token = np.zeros(capacity, np.int32)
        self.slot = np.zeros(capacity, np.int32)
        self.pos = np.zeros(capacity, np.int32)
        self.want = np.zeros(capacity, np.int32)  # Want
        self.temperature = np.zeros(capacity, np.float32)  # 0: greedy
        self.seed = np.zeros(capacity, np.uint64)
        self.choice = np.zeros(capacity, np.int32)  # index of the choice, part of the noise key


class Kernel(ABC):
    """One forward per call. Not thread-safe; the engine serialises."""

    program: Program
    rows: Rows
    tokens: NDArray[np.int32]  # (MAX_HEAD_ROWS) the token of the i-th row that wanted something
    logits: NDArray[np.float32]  # (MAX_HEAD_ROWS, vocab_size) valid where that row wanted LOGITS

    @abstractmethod
    def forward(self, n_rows: int) -> None:
        """Runs `rows[:n_rows]`. Raises NumericalError, DeviceError, RequestError (ids or positions out of range)."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """`device`, `isa`, `threads` and what else `doctor` and `bench` should show."""

    def probe_weights(self) -> float | None:
        """Read bandwidth of the packed weights with this kernel's workers, GB/s; None if it cannot be measured."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Frees threads and memory; a second call does nothing."""
