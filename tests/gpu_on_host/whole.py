"""Whole models on the simulated GPU, and the same models by other means."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import families
import numpy as np
from gpu_on_host.host_gpu import HostGpu, compiler
from numpy.typing import NDArray
from tiny import Tiny, put, tiny

from flashformer.backends.base import Kernel, Want
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.cuda.specialize import DeviceFacts
from flashformer.backends.reference import ReferenceKernel
from flashformer.check import CheckedProgram, check
from flashformer.checkpoint import Tensor
from flashformer.formats import FORMATS, QUANTS
from flashformer.model import ModelSpec
from flashformer.program import Target, build
from flashformer.program.ir import Layout
from flashformer.program.records import rope_begin

F32 = NDArray[np.float32]
CTX, STREAMS = 600, 2
SHARED_BYTES = 232448  # of a block, as an H100 has them

# The (slot, rows) runs of each forward: 16, 8, 5, 2 and 1 rows, of one slot and of two.
Plan = Sequence[Sequence[tuple[int, int]]]
PLAN: Plan = [[(0, 16)], [(0, 5), (1, 3)], [(1, 5)], [(0, 2)], [(0, 1)], [(1, 1), (0, 1)], [(1, 1)]]


@dataclass(frozen=True)
class Case:
    """Configuration `index` of a family in families.py. `head`: format of lm_head if not as stored."""

    family: str
    index: int
    stored: str
    body: str
    head: str
    kv: str
    blocks: int

    def __str__(self) -> str:
        head = f"-{self.head}" if self.head else ""
        return f"{self.family}-{self.index}-{self.body or self.stored}{head}-kv-{self.kv}-{self.blocks}"

    def tiny(self) -> Tiny:
        return _tiny(self.family, self.index, self.stored)

    def target(self, **changes: Any) -> Target:
        chosen: dict[str, Any] = {
            "n_workers": self.blocks, "weight_format": FORMATS[self.stored], "kv_format": FORMATS[self.kv], "rows": 16,
            "streams": STREAMS, "ctx": CTX, "body_quant": QUANTS.get(self.body), "head_quant": QUANTS.get(self.head),
        }  # fmt: skip
        return Target(**(chosen | changes))

    def load(self, *, gpu: Mapping[str, Any] | None = None, **target: Any) -> CudaKernel:
        """`target`: what is to be different in it."""
        model = self.tiny()
        return load(model.spec, model.tensors, self.target(**target), gpu=gpu)

    def reference(self) -> ReferenceKernel:
        model = self.tiny()
        return exact_reference(model.spec, model.tensors, self.target())


@cache
def _tiny(family: str, index: int, stored: str) -> Tiny:
    case = next(c for c in families.CASES if (c.architecture, c.index) == (f"{family}ForCausalLM", index))
    seed = families.SEEDS[case.architecture][index]
    return tiny(seed, stored=stored, **(case.options() | {"ctx": CTX}))


@cache
def checked_program(spec: ModelSpec, target: Target) -> CheckedProgram:
    return check(build(spec, target))


def load(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    target: Target,
    *,
    gpu: Mapping[str, Any] | None = None,
    **options: Any,
) -> CudaKernel:
    """A kernel on a HostGpu of its own, with what `gpu` says of it. `options` of CudaKernel."""
    checked = checked_program(spec, replace(target, layout=Layout.FRAGMENTS))
    facts = DeviceFacts("simulated", target.n_workers, SHARED_BYTES, (9, 0))
    host_gpu = HostGpu(facts=facts, rope_begin=rope_begin(checked.program), **(gpu or {}))
    return CudaKernel(checked, tensors, gpu=host_gpu, compiler=compiler, n_threads=2, **options)


def gpu_of(kernel: CudaKernel) -> HostGpu:
    assert isinstance(kernel._gpu, HostGpu)
    return kernel._gpu


def exact_reference(spec: ModelSpec, tensors: Mapping[str, Tensor], target: Target) -> ReferenceKernel:
    """The same weights and KV format; activations are not rounded."""
    return ReferenceKernel(checked_program(spec, replace(target, exact=True, n_workers=1)), tensors)


# ---- forwards


def text(spec: ModelSpec, slot: int, n: int = CTX) -> list[int]:
    """The first ids of a slot's sequence."""
    found: list[int] = np.random.default_rng(zlib.crc32(b"%d" % slot)).integers(0, spec.vocab_size, CTX).tolist()
    return found[:n]


def run_plan(kernel: Kernel, plan: Plan = PLAN) -> list[F32]:
    """Per slot (positions, vocab_size) logits. Tokens are asserted to be those of the largest logits."""
    spec, pos = kernel.program.spec, [0] * STREAMS
    found: list[list[F32]] = [[np.zeros((0, spec.vocab_size), np.float32)] for _ in range(STREAMS)]
    for runs in plan:
        rows = 0
        for slot, n in runs:
            put(kernel, rows, text(spec, slot)[pos[slot] : pos[slot] + n], pos=pos[slot], slot=slot, want=Want.LOGITS)
            rows, pos[slot] = rows + n, pos[slot] + n
        kernel.forward(rows)
        np.testing.assert_array_equal(kernel.tokens[:rows], kernel.logits[:rows].argmax(1))
        first = 0
        for slot, n in runs:
            found[slot].append(kernel.logits[first : first + n].copy())
            first += n
    return [np.concatenate(parts) for parts in found]


def error(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> float:
    """Root of the mean square of the differences over that of the expected values; infinite for NaN."""
    a, b = (np.concatenate([part.astype(np.float64).ravel() for part in parts]) for parts in (found, expected))
    result = float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
    return result if np.isfinite(result) else np.inf


def assert_same_bits(found: Sequence[F32], expected: Sequence[F32], what: object = "") -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), str(what))
