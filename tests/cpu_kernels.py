"""CPU kernels over tiny models, and the two things tests do with a kernel: prompt logits and greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny import Tiny, put

from flashformer.backends.base import Kernel, Want
from flashformer.backends.cpu.kernel import CpuKernel
from flashformer.backends.cpu.native import load_native
from flashformer.check import check
from flashformer.formats import F32, Format
from flashformer.program import Program, Target, build
from flashformer.program.ir import MAX_HEAD_ROWS

# None: the best that this CPU has; the one below it has its own products.
ISAS = ["portable", "avx2", *(["avx512"] if "amx" in load_native().isas() else []), None]


def program_of(
    model: Tiny,
    *,
    n_workers: int = 2,
    weights: Format = F32,
    kv: Format = F32,
    rows: int = 64,
    streams: int = 1,
    ctx: int = 160,
    exact: bool = False,
    body_quant: Format | None = None,
    head_quant: Format | None = None,
) -> Program:
    return build(model.spec, Target(n_workers, weights, kv, rows, streams, ctx, exact, body_quant, head_quant))


@contextmanager
def cpu_kernel(model: Tiny, *, options: dict[str, Any] | None = None, **target: Any) -> Iterator[CpuKernel]:
    """`options` go to CpuKernel, everything else to `program_of`."""
    kernel = CpuKernel(check(program_of(model, **target)), model.tensors, **(options or {}))
    try:
        yield kernel
    finally:
        kernel.close()


def prompt_logits(kernel: Kernel, ids: list[int], *, chunk: int = MAX_HEAD_ROWS, slot: int = 0) -> NDArray[np.float32]:
    """(n_tokens, vocab_size) logits after each position, `chunk` rows per forward."""
    parts = []
    for begin in range(0, len(ids), chunk):
        part = ids[begin : begin + chunk]
        put(kernel, 0, part, pos=begin, slot=slot, want=Want.LOGITS)
        kernel.forward(len(part))
        parts.append(kernel.logits[: len(part)].copy())
    return np.concatenate(parts)


def prefill(kernel: Kernel, ids: list[int], *, chunk: int, slot: int = 0) -> NDArray[np.float32]:
    """(vocab_size) logits after the last position; the rows before it want nothing."""
    for begin in range(0, len(ids), chunk):
        part = ids[begin : begin + chunk]
        put(kernel, 0, part, pos=begin, slot=slot, want=Want.NOTHING)
        if begin + chunk >= len(ids):
            kernel.rows.want[len(part) - 1] = Want.LOGITS
        kernel.forward(len(part))
    return kernel.logits[0].copy()


def greedy(kernel: Kernel, ids: list[int], n: int) -> list[int]:
    """`n` tokens after a prompt, which runs in chunks of 64 rows."""
    prefill(kernel, ids, chunk=64)
    tokens = [int(kernel.tokens[0])]
    while len(tokens) < n:
        put(kernel, 0, tokens[-1:], pos=len(ids) + len(tokens) - 1, slot=0, want=Want.TOKEN)
        kernel.forward(1)
        tokens.append(int(kernel.tokens[0]))
    return tokens
