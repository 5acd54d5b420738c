"""Device sources -> cubin, by NVRTC from its wheel; and what a cubin says about itself. Neither driver nor toolkit."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources as package_data
from typing import Any

from ...errors import DeviceError
from .specialize import Specialization

ENTRY = "flashformer_forward"
INSTALL = "pip install 'flashformer[cuda]'"
SPECIALIZATION = "specialization.h"
ROOT = f'#include "{SPECIALIZATION}"\n#include "kernel.cuh"\n'

# The same bits everywhere: no contraction, IEEE division and square root (the defaults, spelled out).
OPTIONS = (
    "--std=c++20",
    "--fmad=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ftz=false",
    "-default-device",
    "--ptxas-options=-v",
)


@dataclass(frozen=True)
class Source:
    """What is compiled: a root that includes the headers by their names, and the architecture, e.g. `sm_90`."""

    root: str
    headers: tuple[tuple[str, str], ...]  # (name, text)
    arch: str

    @property
    def options(self) -> tuple[str, ...]:
        return (f"--gpu-architecture={self.arch}", *OPTIONS)


@dataclass(frozen=True)
class Resources:
    """Of one kernel of a cubin, per thread or block. `local_bytes`: its stack; what is spilled is on it."""

    registers: int
    local_bytes: int
    shared_bytes: int  # static
    code_bytes: int


def source_of(specialization: Specialization) -> Source:
    """The kernel's sources with the constants of `specialization`. Raises DeviceError as `architecture` does."""
    headers = {**device_headers(), SPECIALIZATION: specialization.header()}
    return Source(ROOT, tuple(sorted(headers.items())), architecture(specialization.capability))


@cache
def device_headers() -> Mapping[str, str]:
    """Name -> text of every device source in the package."""
    folder = package_data.files(__package__) / "device"
    names = (entry for entry in folder.iterdir() if entry.name.endswith((".cuh", ".h")))
    return {entry.name: entry.read_text() for entry in names}


@cache
def _bindings() -> Any:
    """The module cuda.bindings.nvrtc with its library loaded. Raises DeviceError."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"NVRTC, which compiles the CUDA kernel, cannot be loaded ({reason}): {INSTALL}") from error
    return nvrtc


def version() -> str:
    """Of NVRTC, e.g. `13.0`. Raises DeviceError where it is missing."""
    nvrtc = _bindings()
    major, minor = _done(nvrtc, nvrtc.nvrtcVersion())
    return f"{major}.{minor}"


def architecture(capability: tuple[int, int]) -> str:
    """The best architecture that runs on a device: its own, or an earlier one of its generation.

    Raises DeviceError where NVRTC is missing or knows none.
    """
    nvrtc = _bindings()
    major, minor = capability
    known = _done(nvrtc, nvrtc.nvrtcGetSupportedArchs())[0]
    usable = [arch for arch in known if 10 * major <= arch <= 10 * major + minor]
    if not usable:
        raise DeviceError(
            f"NVRTC {version()} cannot compile for compute capability {major}.{minor}: "
            "install a newer nvidia-cuda-nvrtc"
        )
    return f"sm_{max(usable)}"


def require_compiler(capability: tuple[int, int], driver: str) -> None:
    """Raises DeviceError where NVRTC is missing, cannot compile for the device, or is newer than `driver` can load.

    A driver loads cubins of its own major version of CUDA, whatever the minor one, and of earlier ones.
    """
    architecture(capability)
    major = version().partition(".")[0]
    if int(driver.partition(".")[0]) < int(major):
        raise DeviceError(f"the NVIDIA driver supports CUDA {driver}, needed is {major}.0 or later: update the driver")


def compile_cubin(source: Source) -> tuple[bytes, str]:
    """(cubin, log). Raises DeviceError with the first lines of the log."""
    nvrtc = _bindings()
    texts = [(name.encode(), text.encode()) for name, text in source.headers]
    names, bodies = [name for name, _ in texts], [text for _, text in texts]
    program = _done(
        nvrtc, nvrtc.nvrtcCreateProgram(source.root.encode(), b"flashformer.cu", len(texts), bodies, names)
    )[0]
    try:
        options = [option.encode() for option in source.options]
        result = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        log = _text(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            shown = "\n  ".join(log.strip().splitlines()[:8])
            raise DeviceError(
                f"NVRTC {version()} cannot compile the kernel for {source.arch} ({result.name}); please report this:\n"
                f"  {shown}"
            )
        return _blob(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _done(nvrtc: Any, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call gives behind its status. Raises DeviceError."""
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(f"NVRTC failed with {result[0].name}: install it again ({INSTALL})")
    return result[1:]


def _blob(nvrtc: Any, program: Any, size: Callable[..., Any], get: Callable[..., Any]) -> bytes:
    data: bytes = b" " * _done(nvrtc, size(program))[0]
    _done(nvrtc, get(program, data))
    return data


def _text(nvrtc: Any, program: Any, size: Callable[..., Any], get: Callable[..., Any]) -> str:
    return _blob(nvrtc, program, size, get).rstrip(b"\0").decode(errors="replace")


# ---- cubins: ELF with NVIDIA's own sections ------------------------------------------------------------------------

_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info: (symbol, value), two u32
_RESERVED_SHARED = 1024  # of every block that has shared memory, the system's own
_SIZED = 4  # kind of an attribute whose bytes follow; others hold their value in place of a size


def resources(cubin: bytes, entry: str = ENTRY) -> Resources:
    """What the kernel `entry` needs. Raises ValueError for bytes that are not a cubin that has it."""
    try:
        headers = _headers(cubin)
        found = {name: (i, offset, size) for i, (name, offset, size) in enumerate(headers)}
        index, _, code_bytes = found[f".text.{entry}"]
        symbol = _symbol(_bytes(cubin, found[".symtab"]), _bytes(cubin, found[".strtab"]), entry, index)
        info = _attributes(_bytes(cubin, found[".nv.info"]))
        static = max(found.get(f".nv.shared.{entry}", (0, 0, 0))[2] - _RESERVED_SHARED, 0)
        return Resources(info[_REGISTERS, symbol], info[_FRAME, symbol], static, code_bytes)
    except (struct.error, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"not a cubin with a kernel {entry}: {error!r}") from error


def _headers(cubin: bytes) -> list[tuple[str, int, int]]:
    """(name, offset, size) of every section."""
    if cubin[:4] != b"\x7fELF":
        raise ValueError("not an ELF file")
    begin = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    rows = [struct.unpack_from("<IIQQQQIIQQ", cubin, begin + i * size) for i in range(count)]
    return [(_name(cubin, rows[names][4] + row[0]), row[4], row[5]) for row in rows]


def _name(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _bytes(cubin: bytes, place: tuple[int, int, int]) -> bytes:
    _, offset, size = place
    return cubin[offset : offset + size]


def _symbol(table: bytes, names: bytes, entry: str, section: int) -> int:
    """The index of the kernel's symbol."""
    for i in range(len(table) // 24):
        at, _, _, index = struct.unpack_from("<IBBH", table, 24 * i)
        if index == section and _name(names, at) == entry:
            return i
    raise KeyError(entry)


def _attributes(info: bytes) -> dict[tuple[int, int], int]:
    """(attribute, symbol) -> value of those that are a pair of u32."""
    found, at = {}, 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind == _SIZED:
            if size == 8:
                symbol, value = struct.unpack_from("<II", info, at)
                found[attribute, symbol] = value
            at += size
    return found
