"""Device name -> Kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from .. import env
from ..errors import DeviceError, LoadError, RequestError, UnavailableError
from ..formats import BF16
from ..log import log
from .base import Kernel

if TYPE_CHECKING:
    from ..check import CheckedProgram
    from ..checkpoint import PackedWeights, Tensor
    from ..model.spec import ModelSpec
    from ..program.ir import Target
    from .cpu.topology import Threads
    from .cuda.driver import GpuInfo
    from .packed import Progress

DEVICES = ("auto", "cpu", "cuda", "reference")  # reference: NumPy, for tests
PROMPT_CHUNK = {"cpu": 64, "cuda": 16, "reference": 64}  # rows of a prompt per forward
# A matrix unit is through with 64 rows of bf16 before their weights are read, and of int8 at about that time; 4 bits
# gain less (docs/measuring.md).
MATRIX_PROMPT_CHUNK = {"bf16": 256, "quantized": 128}


def require_device(device: object) -> None:
    """Raises RequestError for a name that is none."""
    if device not in DEVICES:
        raise RequestError(f"device={device!r}: expected one of auto, cpu, cuda")


def prompt_chunk(target: Target, device: str) -> int:
    """Rows of a prompt per forward that are fastest where memory for their buffers is no concern."""
    if device == "cpu" and not target.exact and native_isa() == "amx":
        if target.body_quant is not None:
            return MATRIX_PROMPT_CHUNK["quantized"]
        if target.weight_format is BF16:
            return MATRIX_PROMPT_CHUNK["bf16"]
    return PROMPT_CHUNK[device]


def choose_gpu(device: str, spec: ModelSpec, target_on: Callable[[GpuInfo], Target]) -> GpuInfo | None:
    """The GPU that the kernel for `target_on` it will run on, None where that is not for `cuda` to do.

    `auto` takes a GPU where there is one that can, and otherwise logs once why not. Raises DeviceError where `cuda` is
    asked for and cannot be had.
    """
    if device not in ("auto", "cuda"):
        return None
    try:
        from .cuda.driver import find_gpu
        from .cuda.nvrtc import require_compiler
        from .cuda.specialize import refusals

        gpu = find_gpu()
        require_compiler(gpu.facts.capability, gpu.driver)
        if reasons := list(refusals(spec, target_on(gpu), gpu.facts)):
            raise DeviceError("; ".join(reasons))
        return gpu
    except DeviceError as error:
        if device == "cuda":
            raise UnavailableError(f"device='cuda': {error}; or use device='cpu'") from error
        _say_why_not(str(error))
        return None


@cache
def _say_why_not(reason: str) -> None:
    """Each reason once. Where there is no NVIDIA driver nobody expects a GPU to be used."""
    from .cuda.driver import has_driver

    tell = log.info if has_driver() else log.debug
    tell("running on the CPU, not on a GPU: %s", reason)


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
    if device == "cpu":
        from .cpu.kernel import CpuKernel

        return CpuKernel(checked, weights, cpus=threads.cpus, progress=progress, keep=keep)
    if not isinstance(weights, Mapping):
        raise LoadError(f"{weights.file.path}: packed weights are for the CPU kernel, found device={device!r}")
    if device == "cuda":
        from .cuda.kernel import CudaKernel

        return CudaKernel(checked, weights, n_threads=threads.n, progress=progress)
    from .reference import ReferenceKernel

    return ReferenceKernel(checked, weights, seed=0)


def native_isa() -> str | None:
    """The instruction set that the CPU kernel uses here; None where the extension is not installed."""
    from .cpu.native import load_native

    try:
        return env.isa() or str(load_native().isas()[-1])
    except DeviceError:
        return None


def describe_cuda() -> dict[str, object]:
    """What `doctor` says of GPU, driver and NVRTC; a reason in place of what cannot be used."""
    from .cuda.driver import find_gpus
    from .cuda.nvrtc import version

    found: dict[str, object] = {"gpu": None, "cuda_driver": None, "nvrtc": None}
    try:
        gpus = find_gpus()
        found["gpu"] = [gpu.summary for gpu in gpus]
        found["cuda_driver"] = gpus[0].driver if gpus else None
    except DeviceError as error:
        found["gpu"] = f"none: {error}"
    try:
        found["nvrtc"] = version()
    except DeviceError as error:
        found["nvrtc"] = f"none: {error}"
    return found
