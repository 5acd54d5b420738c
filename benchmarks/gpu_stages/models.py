"""Stages 3, 4 and 5: models of the named shapes. First their logits, against PyTorch on the same GPU; then speed.

The oracle is PyTorch in fp32; the kernel's error may be twice that of PyTorch with activations, keys and values
rounded where the kernel rounds. Of several rows the first must have the same bits as alone. Speeds are of one forward
of a queue of equal ones, on the GPU's clock; beside them the bytes it has to read, and what reading them takes at best
in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashformer.formats import QUANTS, Format
from flashformer.model.outline import read_outline
from flashformer.model.spec import ModelSpec

from .device import Compiler, failing, note_clocks, open_gpu
from .record import Clock, Record

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

    gpu, compiler = open_gpu(record), Compiler()
    record.about(torch=torch.__version__, torch_cuda=torch.version.cuda)
    record.about(weights="random; quantized ones are drawn as codes and scales")
    try:
        for kind in KINDS[record.number]:
            clock.require(kind.name, SECONDS[kind.shape])
            with failing(record, f"{kind.name}: runs"):
                run_kind(record, clock, kind, compiler)
        note_clocks(record, "clocks_after")
    finally:
        gpu.close()
