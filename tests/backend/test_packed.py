"""Packed weights as files: read when everything agrees, packed anew when anything that matters differs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from folders import model_folder, random_weights
from safetensors.numpy import save_file

import flashformer as ff
from flashformer.backends import kept, packed
from flashformer.backends.cpu.native import load_native

PROMPT = [3, 4, 5, 6, 7]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "MIN_BYTES", 0)
    monkeypatch.setattr(kept, "FREE_SHARE", 0)
    return tmp_path / "cache" / "packed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def logits(folder: Path, **options: object) -> bytes:
    with ff.load(folder, **options) as llm:  # type: ignore[arg-type]
        return llm.logits(PROMPT).tobytes()


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.ffpack"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each load so far found its file."""
    found: list[bool] = []
    real = packed.PackedFile.read

    def spy(self: packed.PackedFile, native: object, n_threads: int) -> object:
        region = real(self, native, n_threads)
        found.append(region is not None)
        return region

    monkeypatch.setattr(packed.PackedFile, "read", spy)
    return found


def test_the_second_load_reads_the_same_bits(cache: Path, folder: Path, reads: list[bool]) -> None:
    first = logits(folder)
    assert reads == [False, False]
    assert logits(folder) == first
    assert reads == [False, False, True]
    assert len(files(cache)) == 1
    assert (cache.stat().st_mode & 0o777, files(cache)[0].stat().st_mode & 0o777) == (0o700, 0o600)
    assert logits(folder, threads=1, ctx=64, streams=2) == first  # the layout does not depend on these
    assert reads[-1]


def test_weights_of_a_file_are_those_that_packing_gives(
    cache: Path, folder: Path, reads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights() -> bytes:
        with ff.load(folder) as llm:
            return bytes(llm.kernel._weights.array)  # type: ignore[attr-defined]

    packed_now, read = weights(), weights()
    assert reads == [False, False, True]
    monkeypatch.setenv("FLASHFORMER_CACHE", "off")
    assert packed_now == read == weights()


def change_format(folder: Path) -> dict[str, object]:
    return {"dtype": "bf16"}


def change_weights(folder: Path) -> dict[str, object]:
    model_folder(folder, seed=1)
    return {}


def change_weights_alone(folder: Path) -> dict[str, object]:
    """Neither size nor time of the last write tell."""
    before = (folder / "model.safetensors").stat()
    model_folder(folder, seed=1)
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (folder / "model.safetensors").stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return {}


def touch_weights(folder: Path) -> dict[str, object]:
    os.utime(folder / "model.safetensors", (1, 1))
    return {}


def change_layout(folder: Path) -> dict[str, object]:
    packed.PACK_VERSION += 1
    return {}


def tie(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    return {}


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (change_format, True),
        (change_weights, True),
        (change_weights_alone, True),
        (touch_weights, True),
        (change_layout, True),
        (tie, False),
    ],
)
def test_what_matters_is_packed_anew(
    cache: Path, folder: Path, reads: list[bool], change: object, differs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "PACK_VERSION", packed.PACK_VERSION)
    logits(folder)
    options = change(folder)  # type: ignore[operator]
    logits(folder, **options)
    assert len(files(cache)) == 1 + differs
    assert reads[2:] == ([False, False] if differs else [True])


def damage(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(data)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: damage(path, path.stat().st_size, b"x"),
    "no magic": lambda path: damage(path, 0, b"X"),
    "header": lambda path: damage(path, 60, b"\xff"),
    "a bit of the weights": lambda path: damage(path, 4096 * 8 + 3, b"\x5a"),
    "sums": lambda path: damage(path, -40, b"\xff"),
    "digest": lambda path: damage(path, -1, b"\xff"),
    "web page": lambda path: path.write_bytes(b"<html>" * 1000),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_c39_a_damaged_file_is_packed_anew_once(
    cache: Path, folder: Path, reads: list[bool], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = logits(folder)
    DAMAGES[name](files(cache)[0])
    with caplog.at_level(logging.WARNING, "flashformer"):
        assert logits(folder) == first
    assert any("packing again" in record.message for record in caplog.records)
    assert logits(folder) == first
    assert reads[-1]


LOAD = """
import sys, flashformer as ff
from flashformer.backends import kept, packed
packed.MIN_BYTES = kept.FREE_SHARE = 0
with ff.load(sys.argv[1], threads=1) as llm:
    print(hash(llm.logits([3, 4, 5]).tobytes()))
"""


def test_c40_many_processes_agree_on_one_file(cache: Path, folder: Path) -> None:
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", LOAD, str(folder)]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)]
    results = [process.communicate(timeout=120) for process in running]
    assert {out for out, _ in results} == {results[0][0]}
    assert all(b"warning" not in err.lower() and out.strip() for out, err in results), results
    assert len(files(cache)) == 1
    assert not list(cache.glob("*.tmp"))


def test_c40_a_holder_that_dies_or_hangs_is_not_waited_for(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "LOCK_S", 0.2)
    first = logits(folder)
    files(cache)[0].unlink()
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held'); time.sleep(60)"
    )
    lock = next(cache.glob("*.lock"))
    holder = subprocess.Popen([sys.executable, "-uc", hold, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    try:
        begin = time.monotonic()
        assert logits(folder) == first  # packed for this process alone
        assert time.monotonic() - begin < 20
        assert not files(cache)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert logits(folder) == first
    assert len(files(cache)) == 1


def test_c41_a_folder_that_others_may_write_is_not_used(
    cache: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = logits(folder)
    cache.chmod(0o777)
    with caplog.at_level(logging.WARNING, "flashformer"):
        assert logits(folder) == first
    assert any("others may write" in record.getMessage() for record in caplog.records)
    cache.chmod(0o700)
    files(cache)[0].chmod(0o666)
    assert logits(folder) == first
    assert "others may write to the file" in caplog.text


def test_c41_a_folder_that_cannot_be_made(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(packed, "MIN_BYTES", 0)
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path / "taken"))
    with caplog.at_level(logging.WARNING, "flashformer"):
        assert logits(folder)
    assert "not kept" in caplog.text


def test_c41_a_full_disk(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed.os, "replace", full)
    with caplog.at_level(logging.WARNING, "flashformer"):
        assert logits(folder)
    assert "No space left on device" in caplog.text
    assert not files(cache)
    assert not list(cache.glob("*.tmp"))


def test_a21_too_little_room_is_said_before_writing(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil._ntuple_diskusage(100, 90, 10)  # type: ignore[attr-defined]
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: usage)
    with caplog.at_level(logging.WARNING, "flashformer"):
        assert logits(folder)
    assert "are not kept: no room for them" in caplog.text
    assert not files(cache)


@pytest.mark.parametrize(
    ("free", "n_bytes", "fits", "remaining"),
    [
        (300, 200, True, "abc"),
        (299, 200, True, "bc"),
        (100, 200, True, "c"),
        (99, 200, True, ""),
        (0, 200, True, ""),
        (0, 201, False, "abc"),
    ],
)
def test_the_disk_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, n_bytes: int, fits: bool, remaining: str
) -> None:
    """A tenth of it stays free: for a new file those go that were used the longest ago, or it is not kept."""
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 0, free))  # type: ignore[attr-defined]
    (tmp_path / "other.lock").write_bytes(bytes(100))
    for age, name in enumerate("cba"):
        (tmp_path / f"{name}.ffpack").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}.ffpack", (1000 - age, 1000 - age))
    assert kept.make_room(tmp_path, ".ffpack", n_bytes) is fits
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"{name}.ffpack" for name in remaining), "other.lock"]


def test_c44_the_file_does_not_depend_on_the_instruction_set(
    cache: Path, folder: Path, reads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(folder)
    for isa in load_native().isas():
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
        logits(folder)
        assert reads[-1]
    assert len(files(cache)) == 1


def test_switched_off(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHFORMER_CACHE", "off")
    assert logits(folder)
    assert not cache.exists()


def test_files_unused_for_long_go(cache: Path, folder: Path) -> None:
    logits(folder)
    old = files(cache)[0]
    os.utime(old, (1, 1))
    logits(folder, dtype="bf16")
    assert not old.exists()
    assert len(files(cache)) == 1


def test_bad_weights_leave_no_file(cache: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "bad")
    weights = random_weights(0)
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, str(folder / "model.safetensors"))
    for _ in range(2):
        with pytest.raises(ff.LoadError, match=r"model\.norm\.weight"):
            logits(folder)
    assert not files(cache)
