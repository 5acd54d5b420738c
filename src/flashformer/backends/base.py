"""What every backend gives the engine: a Kernel that runs one forward over rows of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError
from ..program.ir import Program, Target


class Want(IntEnum):
    """What a row asks of the forward."""

    NOTHING = 0
    TOKEN = 1
    LOGITS = 2  # logits and, as they are there, the token too


# Columns of Rows, in the order in which native code takes them: those with an entry per row, then those per adjustment.
ROW_COLUMNS: dict[str, np.dtype] = {
    "token": np.dtype("<i4"),
    "slot": np.dtype("<i4"),
    "pos": np.dtype("<i4"),
    "want": np.dtype("<i4"),  # Want
    "temperature": np.dtype("<f4"),  # 0: greedy
    "top_k": np.dtype("<i4"),  # 0: off
    "top_p": np.dtype("<f4"),  # 1: off
    "min_p": np.dtype("<f4"),  # 0: off
    "seed": np.dtype("<u8"),
    "choice": np.dtype("<i4"),  # index of the choice, part of the noise key
    "adjust_begin": np.dtype("<i4"),  # the row's adjustments are [begin, end), each token once
    "adjust_end": np.dtype("<i4"),
}
ADJUST_COLUMNS: dict[str, np.dtype] = {
    "adjust_token": np.dtype("<i4"),
    "adjust_penalty": np.dtype("<f4"),  # divides a positive logit, multiplies another
    "adjust_bias": np.dtype("<f4"),  # added after that
    "adjust_kept": np.dtype("<f4"),  # where a kernel keeps the logit meanwhile
}
MAX_BIASES = 1024  # adjustments of one row beyond one for every position


class Rows:
    """The rows of one forward, filled in place by the engine; the first `n` given to `forward` count.

    Rows of one slot are adjacent and have consecutive positions; positions below the first are in the
    slot's KV cache already. At most MAX_HEAD_ROWS rows want something. sampling.py says what they get.
    """

    token: NDArray[np.int32]
    slot: NDArray[np.int32]
    pos: NDArray[np.int32]
    want: NDArray[np.int32]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seed: NDArray[np.uint64]
    choice: NDArray[np.int32]
    adjust_begin: NDArray[np.int32]
    adjust_end: NDArray[np.int32]
    adjust_token: NDArray[np.int32]
    adjust_penalty: NDArray[np.float32]
    adjust_bias: NDArray[np.float32]
    adjust_kept: NDArray[np.float32]

    def __init__(self, target: Target) -> None:
        n_adjustments = target.streams * (target.ctx + MAX_BIASES)
        for columns, n in ((ROW_COLUMNS, target.rows), (ADJUST_COLUMNS, n_adjustments)):
            for name, dtype in columns.items():
                setattr(self, name, np.zeros(n, dtype))
        self.top_p[:] = 1


@dataclass(frozen=True)
class Times:
    """When each worker entered each phase, its wait over, and left it; ns of the monotonic clock."""

    begin: int  # of the forward
    end: int
    entered: NDArray[np.int64]  # (n_workers, n_phases); phases that were not run are left out
    left: NDArray[np.int64]  # (n_workers, n_phases)


class Kernel(ABC):
    """One forward per call. Not thread-safe; the engine serialises."""

    program: Program
    rows: Rows
    tokens: NDArray[np.int32]  # (MAX_HEAD_ROWS) the token of the i-th row that wanted something
    logits: NDArray[np.float32]  # (MAX_HEAD_ROWS, vocab_size) valid where that row wanted LOGITS

    @abstractmethod
    def forward(self, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        """Runs `rows[:n_rows]`. Raises NumericalError, DeviceError, RequestError (ids or positions out of range).

        `again` says that the next forward will be of the same rows, with the tokens that they get and at their next
        positions, unless one of those tokens is in `again`. Kernels that can begin with it at once; if another forward
        comes instead, those positions hold what nobody asked for.
        """

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """`device`, `isa`, `threads` and what else `doctor` and `bench` should show."""

    def keep_times(self) -> None:
        """From now on every forward notes its times. Raises DeviceError for a kernel that cannot."""
        raise DeviceError("this kernel keeps no times: use device='cpu' or device='cuda'")

    def forget_times(self) -> None:  # noqa: B027
        """Ends `keep_times`."""

    def times(self) -> Times:
        """Of the last forward since `keep_times`. Raises DeviceError where there is none."""
        raise DeviceError("no times were kept: call keep_times before the forward")

    @property
    def fits_in_cache(self) -> bool:
        """Whether caches may hold the packed weights, so that memory says little."""
        return True

    def probe_weights(self) -> float | None:
        """Read bandwidth of the packed weights with this kernel's workers, GB/s; None if it cannot be measured."""
        return None

    def write_weights(self, path: Path, original: str, error: Mapping[str, Any]) -> None:
        """Writes the packed weights as those of a model (checkpoint/packed.py) that came from `original`.

        Raises OSError, DeviceError for a kernel that packs none.
        """
        raise DeviceError("this kernel packs no weights: use device='cpu'")

    @abstractmethod
    def close(self) -> None:
        """Frees threads and memory; a second call does nothing."""
