"""Builds the device source for the CPU: one shared library per specialisation, together with the simulator.

Libraries lie in a folder of the system's temporary directory under a digest of everything that goes into them, and
appear there by an atomic rename, so that a second run or a parallel one finds them whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
HOST = HERE / "host"
DEVICE = HERE.parents[1] / "src" / "flashformer" / "backends" / "cuda" / "device"

KEPT_S = 3 * 24 * 3600  # of unchanged sources; what is removed is built again

COMPILER = os.environ.get("CXX", "g++")
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++20", "-DFF_HOST", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"]

KERNEL = """#include "ptx.h"
#include "kernel.cuh"

extern "C" void ff_thread(const void* launch, flashformer::u32 smem) {
  flashformer::run_thread(*static_cast<const flashformer::Launch*>(launch), smem);
}
"""


def build(header: str, extra: list[str], main: str = KERNEL, device: Path = DEVICE) -> Path:
    """The path of a library that runs the kernel on the CPU.

    `header` is the text of specialization.h, `extra` are further compiler options such as `-DNAME=1`, `main` the text
    that is compiled: it includes ptx.h first and defines ff_thread. `device`: the folder of the device source, which a
    test may have changed. Raises AssertionError with the compiler's words.
    """
    simulator = simulator_objects()
    sources = _digest(*sorted(device.glob("*.cuh")), *sorted(device.glob("*.h")), *sorted(HOST.glob("*.h")))
    key = _text_digest(header, *extra, main, sources, *map(str, simulator), _version())
    library = _folder() / f"{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=_folder()) as work:
        folder = Path(work)
        (folder / "specialization.h").write_text(header)
        (folder / "main.cpp").write_text(main)
        include = [f"-I{path}" for path in (folder, HOST, device)]
        _run([*FLAGS, *WARNINGS, "-Og", *include, *extra, "-c", "main.cpp", "-o", "main.o"], folder)
        _run(["-shared", "-Wl,-Bsymbolic", "main.o", *map(str, simulator), "-o", "library.so"], folder)
        (folder / "library.so").rename(library)
    return library


def build_case(path: Path, extra: list[str]) -> Path:
    """The library of one of the small kernels in cases/."""
    return build("", extra, f'#line 1 "{path.name}"\n{path.read_text()}')


@cache
def simulator_objects() -> list[Path]:
    """The compiled simulator, which is the same for every kernel."""
    sources = sorted(HOST.glob("*.cpp"))
    parts = [*sources, *sorted(HOST.glob("*.h")), DEVICE / "sites.h", DEVICE / "layout.cuh"]
    key, folder = _text_digest(_digest(*parts), _version()), _folder()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda source: _compiled(source, folder / f"{key}-{source.stem}.o"), sources))


def _compiled(source: Path, target: Path) -> Path:
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            _run([*FLAGS, "-O3", "-c", str(source), "-o", "out.o"], Path(work))
            (Path(work) / "out.o").rename(target)
    return target


@cache
def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"flashformer-gpu-on-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to somebody else"
    for old in folder.iterdir():
        with suppress(FileNotFoundError):  # another process tidies up too
            if old.is_file() and time.time() - old.stat().st_mtime > KEPT_S:
                old.unlink()
    return folder


@cache
def _version() -> str:
    return _text_digest(
        subprocess.run([COMPILER, "--version"], check=True, capture_output=True, text=True).stdout, *FLAGS
    )


def _digest(*files: Path) -> str:
    return _text_digest(*(f"{file.name}\n{file.read_text()}" for file in files))


def _text_digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def _run(arguments: list[str], folder: Path) -> None:
    done = subprocess.run([COMPILER, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
