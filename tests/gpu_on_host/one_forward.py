"""One forward that comes by every site of the kernel: two slots, keys in two chunks, every way to choose a token."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from gpu_on_host.host_gpu import FindingError
from gpu_on_host.whole import CTX, F32, STREAMS, gpu_of, load
from numpy.typing import NDArray
from programs import spec
from switch_models import random_tensors
from tiny import put

from flashformer.backends.base import Want
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.checkpoint import Tensor
from flashformer.errors import FlashformerError
from flashformer.formats import F16
from flashformer.model.spec import QkNorm
from flashformer.program import Target

MODEL = spec(n_layers=2, d_model=64, d_ff=96, head_dim=32, vocab_size=200, qk_norm=QkNorm.WIDTH)
TARGET = Target(3, F16, F16, 16, STREAMS, CTX)  # 3 blocks: the chunks of a head are of different blocks
N_SLOTS = 3  # each is used again and again
BASE = 2**32 - 20  # arrivals wrap around in the middle
ROWS = 4

Results = tuple[F32, NDArray[np.int32]]  # logits (ROWS, vocab_size), tokens (ROWS)


@cache
def tensors() -> dict[str, Tensor]:
    return random_tensors(MODEL, 3, F16)


def one_kernel(*, base: int = BASE, spin_cycles: int = 10**9, **gpu: Any) -> CudaKernel:
    return load(MODEL, tensors(), TARGET, gpu={"n_slots": N_SLOTS} | gpu, base=base, spin_cycles=spin_cycles)


def fill(kernel: CudaKernel) -> None:
    """Row 0 is greedy, 1 sampled, 2 chosen from adjusted and filtered logits, 3 of another slot."""
    rows = kernel.rows
    put(kernel, 0, [5, 6, 7], pos=300, slot=0, want=Want.LOGITS)
    put(kernel, 3, [9], pos=4, slot=1, want=Want.LOGITS)
    rows.temperature[1:3], rows.top_k[2], rows.top_p[2] = 0.7, 9, 0.8
    rows.adjust_begin[2], rows.adjust_end[2] = 0, 3
    rows.adjust_token[:3], rows.adjust_penalty[:3], rows.adjust_bias[:3] = [1, 2, 3], 1.5, 0.2


def run(kernel: CudaKernel) -> Results:
    fill(kernel)
    kernel.forward(ROWS)
    return kernel.logits[:ROWS].copy(), kernel.tokens[:ROWS].copy()


@cache
def sound() -> Results:
    return run(one_kernel())


def same(found: Results) -> bool:
    """To the bit."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(found, sound(), strict=True))


def verdict(kernel: CudaKernel) -> str:
    """What was found, `other results`, or nothing."""
    try:
        return "" if same(run(kernel)) else "other results"
    except (FindingError, FlashformerError) as found:
        return f"{type(found).__name__}: {found}"


def counts(kernel: CudaKernel) -> dict[str, int]:
    return gpu_of(kernel).counts
