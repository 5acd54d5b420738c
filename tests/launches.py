"""A small CudaKernel on a FakeGpu, and what its launches do there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from cuda_models import checked, cuda_program, random_weights
from fake_gpu import FakeGpu
from numpy.typing import NDArray
from programs import spec

from flashformer.backends.base import Want
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.cuda.launch import REPORT_WORDS
from flashformer.program.ir import Space

MODEL = spec(n_layers=2, d_model=56)
WORKERS = 4
WEIGHTS = random_weights(MODEL)
PROGRAM = cuda_program(MODEL)
N_PHASES, HEAD_BEGIN = len(PROGRAM.phases), PROGRAM.head_begin


def compiler(source: Any) -> bytes:
    return str(source.root).encode()


def buffer(space: Space) -> Any:
    return next(b for b in PROGRAM.memory.buffers if b.space is space)


def counter(gpu: FakeGpu, launch: np.void) -> NDArray[np.uint32]:
    return gpu.read_now(int(launch["counter"]), np.uint32, 1)


def token_of(token: int, pos: int) -> int:
    """What comes behind it."""
    return (31 * token + 7 * int(pos)) % MODEL.vocab_size


def tokens_in(gpu: FakeGpu, launch: np.void) -> NDArray[np.int32]:
    """(16) what a launch chose, in the memory of the GPU."""
    return gpu.read_now(int(launch["work"]) + buffer(Space.TOKENS).offset, np.int32, 16)


def given_tokens(gpu: FakeGpu, launch: np.void) -> list[int]:
    """Of the rows; those that the launch before chose are -1 where they are stops."""
    chosen, stops = tokens_in(gpu, launch), launch["stops"][: launch["n_stops"]].tolist()
    found = [t if t >= 0 else int(chosen[-1 - t]) for t in launch["token"][: launch["n_rows"]].tolist()]
    return [-1 if given < 0 and t in stops else t for given, t in zip(launch["token"].tolist(), found, strict=False)]


def sound(gpu: FakeGpu, launch: np.void) -> None:
    """Counts arrivals, and gives every head row a token and logits that tell it from all others."""
    assert counter(gpu, launch)[0] == launch["base"]
    given = given_tokens(gpu, launch)
    if min(given) < 0:
        return
    counter(gpu, launch)[0] = (int(launch["base"]) + WORKERS * int(launch["n_phases"])) % 2**32
    assert launch["n_phases"] == (N_PHASES if launch["n_head_rows"] else HEAD_BEGIN)
    work, rows = int(launch["work"]), launch["head_row"][: launch["n_head_rows"]]
    tokens, results = tokens_in(gpu, launch), gpu.pinned_at(int(launch["results"]), np.int32, len(rows))
    tokens[:] = -1
    tokens[: len(rows)] = results[:] = [token_of(given[row], launch["pos"][row]) for row in rows]
    stride = buffer(Space.LOGITS).shape[1]
    logits = gpu.read_now(work + buffer(Space.LOGITS).offset, np.float32, 16 * stride).reshape(16, stride)
    logits[: len(rows)] = tokens[: len(rows), None] + np.arange(stride)


def reporting(words: dict[int, int]) -> Callable[[FakeGpu, np.void], None]:
    """A launch that puts these words into the report."""

    def run(gpu: FakeGpu, launch: np.void) -> None:
        report = gpu.read_now(int(launch["report"]), np.uint32, REPORT_WORDS + WORKERS)
        assert not report.any()
        for at, word in words.items():
            report[at] = word
        gpu.pinned_at(int(launch["failed"]), np.uint32, 1)[:] = 1
        counter(gpu, launch)[0] = (int(launch["base"]) + WORKERS * int(launch["n_phases"])) % 2**32
        if words.get(0):  # nobody knows how many arrivals an aborted launch has counted
            counter(gpu, launch)[0] += 3
            merges = int(launch["work"]) + buffer(Space.MERGES).offset
            gpu.at(merges, buffer(Space.MERGES).n_bytes)[:] = 1
        gpu.run = lambda gpu, launch: None  # what is queued behind it finds the flag

    return run


@contextmanager
def kernel(gpu: FakeGpu, *, streams: int = 2, **options: Any) -> Iterator[CudaKernel]:
    made = CudaKernel(checked(MODEL, streams=streams), WEIGHTS, gpu=gpu, compiler=compiler, n_threads=2, **options)
    try:
        yield made
    finally:
        made.close()


def put(made: CudaKernel, ids: list[int], *, row: int = 0, slot: int = 0, pos: int = 0, want: Any = Want.TOKEN) -> None:
    at = slice(row, row + len(ids))
    made.rows.token[at], made.rows.slot[at], made.rows.want[at] = ids, slot, want
    made.rows.pos[at] = np.arange(pos, pos + len(ids))
