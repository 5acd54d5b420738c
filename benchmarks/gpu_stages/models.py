"""Stages 3, 4 and 5: models of the named shapes. First their logits, against PyTorch on the same GPU; then speed.

The oracle is PyTorch in fp32; the kernel's error may be twice that of PyTorch with activations, keys and values
rounded where the kernel rounds. Of several rows the first must have the same bits as alone. Speeds are of one forward
of a queue of equal ones, on the GPU's clock; beside them the bytes it has to read, and what reading them takes at best
in the same run. Where logits are wrong, times are in the results as UNCHECKED, and are no speeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashformer.backends.cuda.nvrtc import Source, source_of
from flashformer.backends.cuda.specialize import DeviceFacts, row_counts, specialize
from flashformer.check import CheckedProgram, check
from flashformer.formats import QUANTS, Format
from flashformer.model.outline import read_outline
from flashformer.model.spec import ModelSpec
from flashformer.program import build

from .device import Compiler, failing, note_clocks, open_gpu
from .record import Clock, Record
from .target import cuda_target

SMALL, LARGE = "llama-3.2-1b", "llama-3.1-8b"
INT8, INT4 = QUANTS["int8-g128"], QUANTS["int4-g128"]


@dataclass(frozen=True)
class Kind:
    """`quant` None: bf16."""

    shape: str
    quant: Format | None = None
    streams: int = 1
    contexts: tuple[int, ...] = (32,)
    rows: tuple[int, ...] = (1,)
    trace: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape.removeprefix('llama-')} {self.quant.name if self.quant else 'bf16'}"

    @property
    def spec(self) -> ModelSpec:
        return read_outline(f"shape:{self.shape}").spec

    @property
    def ctx(self) -> int:
        return max(4096, max(self.contexts) + 32)

    def checked(self, facts: DeviceFacts) -> CheckedProgram:
        return check(build(self.spec, cuda_target(facts.n_sm, quant=self.quant, streams=self.streams, ctx=self.ctx)))

    def kernels(self, checked: CheckedProgram, facts: DeviceFacts) -> Iterator[Source]:
        """All that will be asked for, first what is asked for first."""
        for times in (False, True)[: 1 + self.trace]:
            for n in row_counts(checked.program, facts):
                yield source_of(specialize(checked, facts, n_rows=n, times=times))


DEEP, MANY = (32, 1024, 8192), (1, 2, 4, 8, 16)
KINDS = {
    3: (Kind(SMALL, trace=True),),
    4: (Kind(LARGE, trace=True), Kind(LARGE, INT4, trace=True)),
    5: tuple(Kind(shape, quant, 16, DEEP, MANY) for shape in (SMALL, LARGE) for quant in (None, INT8, INT4)),
}
SECONDS = {SMALL: 8.0, LARGE: 25.0}  # that making a model and its first check may take


def run(record: Record, clock: Clock) -> None:
    import torch

    from .one_model import run_kind

    gpu = open_gpu(record)
    record.about(torch=torch.__version__, torch_cuda=torch.version.cuda)
    record.about(weights="random; quantized ones are drawn as codes and scales")
    try:
        with Compiler(record) as compiler:
            for kind in record.units(KINDS[record.number], lambda kind: kind.name):
                clock.require(kind.name, SECONDS[kind.shape])
                with failing(record, f"{kind.name}: runs"):
                    run_kind(record, clock, kind, compiler)
        note_clocks(record, "clocks_after")
    finally:
        gpu.close()
