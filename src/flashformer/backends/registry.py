"""Device name -> Kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import env
from ..errors import DeviceError, LoadError, RequestError
from .base import Kernel

if TYPE_CHECKING:
    from ..check import CheckedProgram
    from ..checkpoint import PackedWeights, Tensor
    from .cpu.topology import Threads
    from .packed import Progress

DEVICES = ("auto", "cpu", "cuda", "reference")  # reference: NumPy, for tests
PROMPT_CHUNK = 64  # rows of a prompt per forward


def resolve_device(device: object) -> str:
    """A device that can be loaded. Raises RequestError for an unknown name, DeviceError for one not built."""
    if device not in DEVICES:
        raise RequestError(f"device={device!r}: expected one of auto, cpu")
    if device == "cuda":
        raise DeviceError("device='cuda': this version has no CUDA kernel yet; use device='cpu'")
    return "cpu" if device == "auto" else str(device)


def load_kernel(
    checked: CheckedProgram,
    weights: Mapping[str, Tensor] | PackedWeights,
    *,
    device: str,
    threads: Threads,
    progress: Progress | None = None,
    keep: bool = True,
) -> Kernel:
    """Maps or packs the weights and makes the kernel ready. `threads` says where the program's workers may be pinned;
    `keep`, that weights packed now may be kept in the cache.

    Raises LoadError for weights that cannot be used, DeviceError where the machine cannot run the kernel.
    """
    if device == "reference":
        from .reference import ReferenceKernel

        if not isinstance(weights, Mapping):
            raise LoadError(f"{weights.file.path}: packed weights are for the CPU kernel, found device={device!r}")
        return ReferenceKernel(checked, weights, seed=0)
    from .cpu.kernel import CpuKernel

    return CpuKernel(checked, weights, cpus=threads.cpus, progress=progress, keep=keep)


def native_isa() -> str | None:
    """The instruction set that the CPU kernel uses here; None where the extension is not installed."""
    from .cpu.native import load_native

    try:
        return env.isa() or str(load_native().isas()[-1])
    except DeviceError:
        return None
