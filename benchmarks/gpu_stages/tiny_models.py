"""Stage 2: small models of every family in every format against NumPy; the same bits again, however rows are grouped.

The oracle keeps activations and keys in fp32, with weights as the format has them. In bf16 the kernel's error may be
three times that of NumPy with bf16 activations and keys; in the other formats, whose activations are f16, MOST_F16 of
the largest logit.
"""

from __future__ import annotations

import secrets
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from flashformer.backends.cuda.driver import DriverGpu
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.cuda.nvrtc import source_of
from flashformer.backends.cuda.specialize import row_counts, specialize
from flashformer.backends.reference.kernel import ReferenceKernel
from flashformer.check import CheckedProgram, check
from flashformer.formats import BF16, F16, F32, QUANTS, Format
from flashformer.program import Target, build

from .decode import F32Array, ask, prompt_logits, relative_error
from .device import Compiler, failing, host_cores, note_clocks, open_gpu
from .families import MODELS, Tiny, tiny
from .record import Clock, OutOfTimeError, Record
from .target import cuda_target

CTX, PROMPT = 320, 277  # positions: over the border of a chunk of 256 keys
COMPARED = 24  # last positions of the prompt, and the first ones
CUTS = (16, 8, 5, 2, 1)
RERUNS = 100
STREAMS = 16
MOST_F16 = 1e-2
ALL_FORMATS = tuple(f for f in QUANTS.values() if not f.codebook)


@dataclass(frozen=True)
class Case:
    """`fmt`: bf16, f16, or a quantized format with activations in f16."""

    model: int
    fmt: Format

    @property
    def kv(self) -> Format:
        return BF16 if self.fmt is BF16 else F16

    def target(self, n_workers: int) -> Target:
        plain = self.fmt if self.fmt in (BF16, F16) else BF16
        quant = None if self.fmt is plain else self.fmt
        return cuda_target(n_workers, fmt=plain, kv=self.kv, quant=quant, streams=STREAMS, ctx=CTX)


def cases() -> list[Case]:
    """Every family in bf16, then one family in every format, then every family in the smallest."""
    first = [Case(i, BF16) for i in range(len(MODELS))]
    formats = [Case(0, f) for f in (F16, *ALL_FORMATS)]
    rest = [Case(i, QUANTS["int4-g32-zp"]) for i in range(1, len(MODELS))]
    return [*first, *formats, *rest]


def run(record: Record, clock: Clock) -> None:
    gpu, compiler, seed = open_gpu(record), Compiler(), secrets.randbits(32)
    record.about(seed=seed, cases=len(cases()), numpy=np.__version__)
    programs: dict[Case, CheckedProgram] = {}
    done, pool = 0, ProcessPoolExecutor(host_cores(), get_context("spawn"))
    try:
        oracles = {case: pool.submit(oracle, case, seed) for case in cases()}
        for case in cases():
            clock.require("making Programs", 10)
            programs[case] = check(build(tiny(case.model, seed).spec, case.target(gpu.info.facts.n_sm)))
        sources = [
            source_of(specialize(checked, gpu.info.facts, n_rows=n))
            for checked in programs.values()
            for n in row_counts(checked.program, gpu.info.facts)
        ]
        record.result("kernels_compiled", compiler.prepare(sources))
        for done, case in enumerate(cases()):
            clock.require(f"case {done} of {len(programs)}", 2)
            exact, allowed = oracles[case].result(timeout=max(clock.left_s, 0.1))
            model = tiny(case.model, seed)
            name = f"{model.name} {case.fmt.name}"
            with failing(record, f"{name}: runs"):
                _one(record, name, case, programs[case], model, compiler, exact, allowed)
        note_clocks(record, "clocks_after")
    except (OutOfTimeError, TimeoutError) as reached:
        raise OutOfTimeError(f"{reached}; {done} cases done") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        gpu.close()


def _one(
    record: Record, name: str, case: Case, checked: CheckedProgram, model: Tiny, compiler: Compiler, exact: F32Array,
    allowed: float,
) -> None:  # fmt: skip
    ids = _prompt(case, model)
    kernel = CudaKernel(checked, model.weights, gpu=DriverGpu(), compiler=compiler, n_threads=host_cores())
    try:
        found = prompt_logits(kernel, ids, CUTS[0], slot=3)
        error = relative_error(found[_compared()], exact)
        record.check(f"{name}: logits", error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}")
        for cut in CUTS[1:]:
            again = prompt_logits(kernel, ids, cut, slot=cut % STREAMS)
            record.check(f"{name}: same bits in forwards of {cut}", _equal(found, again), f"{found.shape} logits")
        record.check(f"{name}: same bits beside other slots", _beside(kernel, ids, found), "2, 5, 8, 16 slots")
        record.check(f"{name}: same bits {RERUNS} times", _reruns(kernel, ids, found), "the last 5 rows")
    finally:
        kernel.close()


def _compared() -> NDArray[np.int64]:
    return np.concatenate([np.arange(COMPARED), np.arange(PROMPT - COMPARED, PROMPT)])


def _equal(a: F32Array, b: F32Array) -> bool:
    return a.tobytes() == b.tobytes()


def _prompt(case: Case, model: Tiny) -> NDArray[np.int32]:
    return np.random.default_rng(case.model).integers(0, model.spec.vocab_size, PROMPT).astype(np.int32)


def oracle(case: Case, seed: int) -> tuple[F32Array, float]:
    """Logits in fp32 where they are compared, and the error that is allowed. Runs in a process of its own."""
    model, made = tiny(case.model, seed), case.target(2)
    ids = _prompt(case, model)
    plain = Target(2, made.weight_format, F32, 16, 1, CTX, True, made.body_quant, made.head_quant)
    exact = _numpy_logits(plain, model, ids)
    if case.fmt is not BF16:
        return exact, MOST_F16
    rounded = _numpy_logits(replace(plain, exact=False, kv_format=BF16), model, ids)
    return exact, 3 * relative_error(rounded, exact)


def _numpy_logits(target: Target, model: Tiny, ids: NDArray[np.int32]) -> F32Array:
    kernel = ReferenceKernel(check(build(model.spec, target)), model.weights)
    return prompt_logits(kernel, ids, 16, wanted=_compared())


def _beside(kernel: CudaKernel, ids: NDArray[np.int32], expected: F32Array) -> bool:
    """The last token in slot 3 again, with the slots after it at other positions in the same forward."""
    same = True
    for n in (2, 5, 8, 16):
        for row in range(n):
            slot, pos = (3 + row) % STREAMS, PROMPT - 1 - (7 * row if row else 0)
            if slot != 3:  # slots hold different prefixes of the prompt, or zeros: nobody looks at them
                ask(kernel, row, ids[pos : pos + 1], pos, slot)
            else:
                ask(kernel, row, ids[-1:], PROMPT - 1, slot)
        kernel.forward(n)
        same = same and _equal(kernel.logits[0], expected[-1])
    return same


def _reruns(kernel: CudaKernel, ids: NDArray[np.int32], expected: F32Array) -> bool:
    same = True
    for _ in range(RERUNS):
        ask(kernel, 0, ids[-5:], PROMPT - 5, 3)
        kernel.forward(5)
        same = same and _equal(kernel.logits[:5], expected[-5:])
    return same
