"""Who computes what: tile widths, and the units of each phase dealt over the workers."""

from __future__ import annotations

import heapq
from itertools import pairwise

from ..formats import Format
from .ir import LANES, Span

# (least outputs, vectors per tile): wide tiles keep more sums in flight, narrow ones split small matrices evenly.
_TILE_WIDTHS = ((1024, 4), (128, 2), (0, 1))
# Where one row reads two tiles side by side, these come fastest from 56 to 96 KiB apart (docs/measuring.md).
_HEAD_TILE_BYTES = 96 << 10


def tile_vectors(n_out: int, *, even: bool = False) -> int:
    """Vectors of 16 outputs per tile. Depends on the matrix alone, so packed weights suit any worker count."""
    vectors = next(v for least, v in _TILE_WIDTHS if n_out >= least)
    return max(vectors, 2) if even else vectors


def head_vectors(n_out: int, k: int, fmt: Format) -> int:
    """The same of lm_head: narrower where that alone brings a tile below _HEAD_TILE_BYTES.

    Other matrices stay wide, as narrow tiles make prompts slower, of which only the last row meets the head. So do
    tiles of fewer than 8 bits, which are slower for one row too when they are narrow.
    """
    vectors, narrow = tile_vectors(n_out), 2
    groups = -(-k // fmt.k_multiple)
    too_wide = groups * fmt.group_bytes(vectors) > _HEAD_TILE_BYTES >= groups * fmt.group_bytes(narrow)
    return narrow if vectors > narrow and fmt.bits >= 8 and too_wide else vectors


def tile_count(n_out: int, vectors: int) -> int:
    return -(-n_out // (vectors * LANES))


def even_spans(n_units: int, n_workers: int) -> tuple[Span, ...]:
    """Contiguous spans whose lengths differ by at most one."""
    bounds = [n_units * w // n_workers for w in range(n_workers + 1)]
    return tuple(Span(b, e) for b, e in pairwise(bounds))


def cyclic_spans(n_units: int, n_workers: int, rotation: int) -> tuple[Span, ...]:
    """Every n_workers-th unit: balanced over any prefix of the units, as attention needs while a context grows."""
    return tuple(Span((w + rotation) % n_workers, n_units, n_workers) for w in range(n_workers))


class Dealer:
    """Deals whole tiles so that both phases and cumulative bytes stay level.

    All wait for who has most tiles of a phase, so nobody gets more than the mean, rounded up. Within that each tile
    goes to the worker that has read least: what one phase gives too much, the next ones take back.
    """

    def __init__(self, n_workers: int) -> None:
        self.read_bytes = [0] * n_workers  # per worker, over all phases dealt so far

    def deal(self, n_tiles: int, tile_bytes: int) -> tuple[Span, ...]:
        n_workers = len(self.read_bytes)
        most = -(-n_tiles // n_workers)
        heap = [(n_bytes, w) for w, n_bytes in enumerate(self.read_bytes)]
        heapq.heapify(heap)
        counts = [0] * n_workers
        for _ in range(n_tiles):
            n_bytes, w = heapq.heappop(heap)
            counts[w] += 1
            if counts[w] < most:
                heapq.heappush(heap, (n_bytes + tile_bytes, w))
        spans, begin = [], 0
        for w, count in enumerate(counts):
            spans.append(Span(begin, begin + count))
            begin += count
            self.read_bytes[w] += count * tile_bytes
        return tuple(spans)
