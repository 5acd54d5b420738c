"""Stage 2: small models of every family in every format against NumPy; the same bits again, however rows are grouped.

The oracle keeps activations and keys in fp32, with weights as the format has them. In bf16 the kernel's error may be
three times that of NumPy with bf16 activations and keys; in the other formats, whose activations are f16, MOST_F16 of
the largest logit. Each kernel's own logits are compared; of wrong ones the results say where they are furthest off and
which phase was the first to leave something else than NumPy.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.cuda.nvrtc import Source, source_of
from flashformer.backends.cuda.specialize import DeviceFacts, row_counts, specialize
from flashformer.backends.reference.kernel import ReferenceKernel
from flashformer.check import CheckedProgram, check
from flashformer.errors import NumericalError
from flashformer.formats import BF16, F16, F32, QUANTS, Format
from flashformer.program import Target, build

from .bisect import first_wrong_phase
from .compare import Comparison, compare
from .decode import F32Array, ask, prompt_logits, relative_error
from .device import Compiler, failing, host_cores, note_clocks, note_failure, open_gpu
from .families import MODELS, Tiny, tiny
from .record import Clock, OutOfTimeError, Record
from .target import cuda_target
from .trace import tracing_hangs
from .watch import WatchedGpu, watch

CTX, PROMPT = 320, 277  # positions: over the border of a chunk of 256 keys
COMPARED = 24  # last positions of the prompt, and the first ones
CUTS = (16, 8, 5, 2, 1)
RERUNS = 100
BISECTED = 4  # cases at most: one bug shows in many of them
STREAMS, SLOT = 16, 3  # SLOT holds the prompt in forwards of CUTS[0]
MOST_F16 = 1e-2
ALL_FORMATS = tuple(f for f in QUANTS.values() if not f.codebook)


@dataclass(frozen=True)
class Case:
    """`fmt`: bf16, f16, or a quantized format with activations in f16."""

    model: int
    fmt: Format

    @property
    def name(self) -> str:
        return f"{MODELS[self.model][0].removesuffix('ForCausalLM')}-{self.model} {self.fmt.name}"

    @property
    def kv(self) -> Format:
        return BF16 if self.fmt is BF16 else F16

    def target(self, n_workers: int) -> Target:
        plain = self.fmt if self.fmt in (BF16, F16) else BF16
        quant = None if self.fmt is plain else self.fmt
        return cuda_target(n_workers, fmt=plain, kv=self.kv, quant=quant, streams=STREAMS, ctx=CTX)

    def checked(self, model: Tiny, facts: DeviceFacts) -> CheckedProgram:
        return check(build(model.spec, self.target(facts.n_sm)))

    def kernels(self, checked: CheckedProgram, facts: DeviceFacts) -> Iterator[Source]:
        for n in row_counts(checked.program, facts):
            yield source_of(specialize(checked, facts, n_rows=n))


def cases() -> list[Case]:
    """Every family in bf16, then one family in every format, then every family in the smallest."""
    first = [Case(i, BF16) for i in range(len(MODELS))]
    formats = [Case(0, f) for f in (F16, *ALL_FORMATS)]
    rest = [Case(i, QUANTS["int4-g32-zp"]) for i in range(1, len(MODELS))]
    return [*first, *formats, *rest]


def run(record: Record, clock: Clock) -> None:
    gpu, seed = open_gpu(record), record.facts.get("seed", secrets.randbits(32))
    record.about(seed=seed, cases=len(cases()), numpy=np.__version__)
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # of the oracles' processes
    pool = ProcessPoolExecutor(host_cores(), get_context("spawn"))
    done = 0
    try:
        with Compiler(record) as compiler:
            oracles, programs = {}, {}
            for case in record.left(cases()):
                clock.require("making Programs", 10)
                with failing(record, f"{case.name}: is made"):
                    oracles[case] = pool.submit(oracle, case, seed)
                    programs[case] = case.checked(tiny(case.model, seed), gpu.info.facts)
                    compiler.prepare(case.kernels(programs[case], gpu.info.facts))
            for case in record.units(cases(), lambda case: case.name):
                clock.require(f"case {case.name}", 2)
                with failing(record, f"{case.name}: runs"):
                    exact, allowed = _answer(oracles[case], clock)
                    model = tiny(case.model, seed)
                    CaseRun(record, case, model, exact, allowed).run(programs[case], compiler)
                done += 1
            note_clocks(record, "clocks_after")
    except OutOfTimeError as reached:
        raise OutOfTimeError(f"{reached}; {done} cases done") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        gpu.close()


def _answer(begun: Future[tuple[F32Array, float]], clock: Clock) -> tuple[F32Array, float]:
    """Of an oracle. Raises what went wrong there, OutOfTimeError while it is not known."""
    try:
        return begun.result(timeout=max(clock.left_s, 0.1))
    except TimeoutError:
        raise OutOfTimeError("waiting for NumPy") from None


def compared() -> NDArray[np.int64]:
    """The positions whose logits the oracle has."""
    return np.concatenate([np.arange(COMPARED), np.arange(PROMPT - COMPARED, PROMPT)])


@dataclass(frozen=True)
class CaseRun:
    """The checks of one case. `exact`: logits at `compared()`."""

    record: Record
    case: Case
    model: Tiny
    exact: F32Array
    allowed: float

    @property
    def name(self) -> str:
        return self.case.name

    def run(self, checked: CheckedProgram, compiler: Compiler) -> None:
        ids = _prompt(self.case, self.model)
        kernel = CudaKernel(checked, self.model.weights, gpu=WatchedGpu(), compiler=compiler, n_threads=host_cores())
        watch(kernel)
        try:
            with tracing_hangs(self.record, self.name, kernel):
                self._checks(kernel, ids)
        finally:
            kernel.close()

    def _checks(self, kernel: CudaKernel, ids: NDArray[np.int32]) -> None:
        first = self._every_cut(kernel, ids)
        if not len(first):
            self.record.skip(f"{self.name}: the same bits again, as no forwards gave any")
            return
        self._same("beside other slots", self._beside(kernel, ids, first))
        self._same(f"{RERUNS} times", self._reruns(kernel, ids, first))

    def _every_cut(self, kernel: CudaKernel, ids: NDArray[np.int32]) -> F32Array:
        """The logits of each, and the same bits as in the first that has any, which are returned; empty if none has."""
        first = np.empty(0, np.float32)
        for cut in CUTS:
            slot, name = (cut % STREAMS if len(first) else SLOT), f"{self.name}: logits in forwards of {cut}"
            self.record.now(name)
            try:
                found = prompt_logits(kernel, ids, cut, slot)
            except NumericalError as error:
                note_failure(self.record, name, error)
                self._bisect(kernel, ids, cut, slot, int(kernel.rows.pos[0]))
                continue
            one = compare(found[compared()], self.exact, compared(), self.allowed)
            if not self.record.check(name, one.error <= self.allowed, f"{one.text}, allowed {self.allowed:.2e}"):
                self.record.result(name, one.facts())
                if one.first_above is not None:
                    self._bisect(kernel, ids, cut, slot, one.first_above // cut * cut)
            if len(first):
                self._same(f"in forwards of {cut}", [compare(found, first, np.arange(PROMPT))])
            else:
                first = found
        return first

    def _bisect(self, kernel: CudaKernel, ids: NDArray[np.int32], cut: int, slot: int, begin: int) -> None:
        """Of the forward from position `begin` on, the first that was wrong."""
        what, where = "first wrong phase of ", f"{self.name} in forwards of {cut}"
        done = [name for name in self.record.document()["results"] if name.startswith(what)]
        if len(done) < BISECTED:
            self.record.now(f"bisecting {where}")
            reference = ReferenceKernel(check(build(self.model.spec, plain(self.case))), self.model.weights)
            end = min(begin + cut, PROMPT)
            with failing(self.record, f"bisecting {where}"):
                found = first_wrong_phase(kernel, reference, ids, begin, end, slot)
                self.record.result(what + where, {"positions": [begin, end], **found})

    def _same(self, how: str, comparisons: Iterable[Comparison]) -> None:
        """All of them, which may be made on the way, are of the same bits."""
        name = f"{self.name}: same bits {how}"
        self.record.now(name)
        with failing(self.record, name, NumericalError):
            found = list(comparisons)
            differ = [one for one in found if one.n_unequal]
            detail = f"{len(differ)} of {len(found)} differ: {differ[0].bits}" if differ else f"{len(found)} times"
            if not self.record.check(name, not differ, detail):
                self.record.result(name, differ[0].facts())

    def _beside(self, kernel: CudaKernel, ids: NDArray[np.int32], expected: F32Array) -> Iterator[Comparison]:
        """The last token in SLOT again, with the slots after it at other positions in the same forward."""
        for n in (2, 5, 8, 16):
            for row in range(n):  # slots hold different prefixes of the prompt, or zeros: nobody looks at them
                slot, pos = (SLOT + row) % STREAMS, PROMPT - 1 - 7 * row
                ask(kernel, row, ids[pos : pos + 1], pos, slot)
            kernel.forward(n)
            yield compare(kernel.logits[:1].copy(), expected[-1:], [PROMPT - 1])

    def _reruns(self, kernel: CudaKernel, ids: NDArray[np.int32], expected: F32Array) -> Iterator[Comparison]:
        for _ in range(RERUNS):
            ask(kernel, 0, ids[-5:], PROMPT - 5, SLOT)
            kernel.forward(5)
            yield compare(kernel.logits[:5].copy(), expected[-5:], np.arange(PROMPT - 5, PROMPT))


def _prompt(case: Case, model: Tiny) -> NDArray[np.int32]:
    return np.random.default_rng(case.model).integers(0, model.spec.vocab_size, PROMPT).astype(np.int32)


def plain(case: Case) -> Target:
    """For NumPy: nothing but the weights is rounded."""
    made = case.target(2)
    return Target(2, made.weight_format, F32, 16, 1, CTX, True, made.body_quant, made.head_quant)


def oracle(case: Case, seed: int) -> tuple[F32Array, float]:
    """Logits in fp32 where they are compared, and the error that is allowed. Runs in a process of its own."""
    model = tiny(case.model, seed)
    ids = _prompt(case, model)
    exact = _numpy_logits(plain(case), model, ids)
    if case.fmt is not BF16:
        return exact, MOST_F16
    rounded = _numpy_logits(replace(plain(case), exact=False, kv_format=BF16), model, ids)
    return exact, 3 * relative_error(rounded, exact)


def _numpy_logits(target: Target, model: Tiny, ids: NDArray[np.int32]) -> F32Array:
    kernel = ReferenceKernel(check(build(model.spec, target)), model.weights)
    return prompt_logits(kernel, ids, 16, wanted=compared())
