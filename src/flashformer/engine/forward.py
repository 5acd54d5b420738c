"""One forward over rows of one slot, for `Turns.take`: fills the rows, runs the kernel, keeps account of the cache.

Rows are shared by all requests, so they are filled anew, in place, for every forward.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Kernel, Want
from .slots import Slot


def run_prompt(kernel: Kernel, slot: Slot, ids: NDArray[np.int32], begin: int, end: int, want: Want) -> None:
    """Rows for tokens [begin, end) of `ids`, which all want `want`. Who wants something fills its sampling."""
    rows, count = kernel.rows, end - begin
    rows.token[:count] = ids[begin:end]
    rows.slot[:count] = slot.index
    rows.pos[:count] = np.arange(begin, end)
    rows.want[:count] = want
    assert slot.n == begin  # so an interrupt during the forward leaves what lies before these rows
    kernel.forward(count)
    slot.ids[begin:end] = ids[begin:end]
    slot.held.n = end


def prompt_logits(kernel: Kernel, slot: Slot, ids: NDArray[np.int32], begin: int, end: int) -> NDArray[np.float32]:
    """(end - begin, vocab_size) logits after tokens [begin, end), at most MAX_HEAD_ROWS of them."""
    rows, count = kernel.rows, end - begin
    rows.temperature[:count] = rows.adjust_begin[:count] = rows.adjust_end[:count] = 0
    run_prompt(kernel, slot, ids, begin, end, Want.LOGITS)
    return kernel.logits[:count].copy()
