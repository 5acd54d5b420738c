"""What Programs of the stages are made for."""

from __future__ import annotations

from flashformer.formats import BF16, Format
from flashformer.program import Target
from flashformer.program.ir import Layout

ROWS = 16


def cuda_target(
    n_workers: int, *, fmt: Format = BF16, kv: Format = BF16, quant: Format | None = None, streams: int = 1,
    ctx: int = 512,
) -> Target:  # fmt: skip
    """For the CUDA kernel; `quant` is of body and head."""
    return Target(n_workers, fmt, kv, ROWS, streams, ctx, False, quant, quant, Layout.FRAGMENTS)
