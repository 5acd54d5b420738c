"""Compiling for a GPU without one: NVRTC, what a cubin says about itself, cubins on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
from pathlib import Path

import pytest
from cuda_models import B200, H100, RTX_5090

import flashformer as ff
from flashformer.backends.cuda import cache, nvrtc
from flashformer.backends.cuda.cache import cubin_of
from flashformer.backends.cuda.nvrtc import Source, architecture, compile_cubin, resources

SMALL = """#include "value.h"
extern "C" __global__ void __launch_bounds__(288, 1) flashformer_forward(float* p, float a, float b) {
  p[threadIdx.x] = a * b + kValue;
}
"""
SPILLS = """extern "C" __global__ void flashformer_forward(int* p, int n) {
  __shared__ int shared[100];
  int local[64];
  for (int i = 0; i < 64; ++i) local[i] = p[i];
  shared[threadIdx.x] = local[n];
  __syncthreads();
  for (int i = 0; i < n; ++i) p[local[(i + n) % 64]] = shared[i];
}
"""


def small(value: str = "2.0f", arch: str = "sm_90") -> Source:
    return Source(SMALL, (("value.h", f"constexpr float kValue = {value};"),), arch)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_resources_are_those_that_the_compiler_reports(arch: str) -> None:
    for root in (SMALL, SPILLS):
        cubin, log = compile_cubin(dataclasses.replace(small(arch=arch), root=root))
        found = resources(cubin)
        assert f"Used {found.registers} registers" in log
        assert f"{found.local_bytes} bytes stack frame" in log
        smem = re.search(r"(\d+) bytes smem", log)
        assert found.shared_bytes == (int(smem[1]) if smem else 0)
        assert found.code_bytes % 128 == 0
        assert found.code_bytes > 0
    assert found.shared_bytes == 400


def test_a_stack_is_seen() -> None:
    assert resources(compile_cubin(dataclasses.replace(small(), root=SPILLS))[0]).local_bytes == 256


def test_products_are_not_contracted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --fmad=false the sum would be one instruction less, and other bits."""
    ours = code(compile_cubin(small())[0])
    monkeypatch.setattr(nvrtc, "OPTIONS", tuple(option for option in nvrtc.OPTIONS if option != "--fmad=false"))
    assert code(compile_cubin(small())[0]) != ours
    monkeypatch.undo()
    assert code(compile_cubin(small())[0]) == ours


def code(cubin: bytes) -> bytes:
    (found,) = [cubin[at : at + n] for name, at, n in nvrtc._headers(cubin) if name.startswith(".text.")]
    return found


def test_a_compile_that_fails_shows_what_the_compiler_says() -> None:
    with pytest.raises(ff.DeviceError, match=r"sm_90.*please report this:\n.*flashformer.cu\(1\): error") as caught:
        compile_cubin(Source("int f() { return no_such_name; }", (), "sm_90"))
    assert "no_such_name" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF" + bytes(100), b"<html>" * 100])
def test_what_is_no_cubin_has_no_resources(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a"):
        resources(data)


def test_a_kernel_that_is_not_in_a_cubin_has_no_resources() -> None:
    with pytest.raises(ValueError, match="no_kernel"):
        resources(compile_cubin(small())[0], "no_kernel")


def test_the_architecture_is_the_devices_own_or_an_earlier_one_of_its_generation() -> None:
    assert [architecture(c) for c in ((9, 0), (10, 0), (12, 0))] == ["sm_90", "sm_100", "sm_120"]
    assert architecture((9, 9)) == "sm_90"
    with pytest.raises(ff.DeviceError, match=r"cannot compile for compute capability 99\.0.*newer"):
        architecture((99, 0))
    assert [facts.arch for facts in (H100, B200, RTX_5090)] == ["sm_90", "sm_100", "sm_120"]


# ---- cubins on disk ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubin"


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """The sources that were compiled so far."""
    made: list[Source] = []

    def spy(source: Source) -> tuple[bytes, str]:
        made.append(source)
        return compile_cubin(source)

    monkeypatch.setattr(cache, "compile_cubin", spy)
    return made


def test_a_cubin_is_compiled_once(folder: Path, compiles: list[Source]) -> None:
    first = cubin_of(small())
    assert cubin_of(small()) == first == compile_cubin(small())[0]
    assert len(compiles) == 1
    (path,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert path.read_bytes() == hashlib.sha256(first).digest() + first


def test_what_decides_a_cubin_is_in_its_name(
    compiles: list[Source], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small()
    keys = {cache.key(source), cache.key(small("3.0f")), cache.key(small(arch="sm_100"))}
    keys.add(cache.key(dataclasses.replace(source, root=SMALL + "\n")))
    monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "--maxrregcount=64"))
    keys.add(cache.key(source))
    monkeypatch.setattr(cache, "version", lambda: "99.9")
    keys.add(cache.key(source))
    assert len(keys) == 6


@pytest.mark.parametrize(
    "damage",
    {
        "empty": lambda data: b"",
        "short": lambda data: data[:-1],
        "long": lambda data: data + b"x",
        "a bit": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        "the digest": lambda data: bytes([data[0] ^ 1]) + data[1:],
        "digest of nothing": lambda data: hashlib.sha256(b"").digest(),
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
def test_a_damaged_file_is_compiled_anew(
    damage: object, folder: Path, compiles: list[Source], caplog: pytest.LogCaptureFixture
) -> None:
    first = cubin_of(small())
    (path,) = folder.iterdir()
    path.write_bytes(damage[1](path.read_bytes()))  # type: ignore[index]
    with caplog.at_level(logging.WARNING):
        assert cubin_of(small()) == first
    assert "compiling again" in caplog.text
    assert cubin_of(small()) == first
    assert len(compiles) == 2


def test_a_file_that_others_may_write_is_not_trusted(folder: Path, compiles: list[Source]) -> None:
    cubin_of(small())
    (path,) = folder.iterdir()
    path.chmod(0o666)
    cubin_of(small())
    assert len(compiles) == 2
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_is_not_followed(folder: Path, compiles: list[Source], tmp_path: Path) -> None:
    cubin_of(small())
    (path,) = folder.iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    cubin_of(small())
    assert len(compiles) == 2
    assert not path.is_symlink()


def test_a_folder_that_others_may_write_is_not_used(
    folder: Path, compiles: list[Source], caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        cubin_of(small())
    assert "others may write to the folder" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_cache_that_is_off_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiles: list[Source]
) -> None:
    monkeypatch.setenv("FLASHFORMER_CACHE", "off")
    monkeypatch.setenv("HOME", str(tmp_path))
    cubin_of(small())
    cubin_of(small())
    assert len(compiles) == 2
    assert list(tmp_path.rglob("*")) == []


def test_a_folder_that_cannot_be_written_costs_a_warning(
    folder: Path, compiles: list[Source], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        assert resources(cubin_of(small())).registers > 0
    assert "No space left" in caplog.text
    assert list(folder.iterdir()) == []
