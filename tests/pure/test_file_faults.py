"""Faults of model files, each named by its row: what is refused, what is said, and what does not happen."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import VOCAB_SIZE, model_folder
from safetensors.torch import save_file
from weight_files import assert_equal_to_library, blob, entry, random_tensors, refused, write_index, write_shards

from flashformer import LoadError
from flashformer.checkpoint import open_checkpoint
from flashformer.checkpoint.files import read_bytes
from flashformer.checkpoint.folder import open_tensors
from flashformer.checkpoint.safetensors import open_safetensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def read_all(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    _ = checkpoint.tensors, checkpoint.tokenizer


# ---- A1, A2: sizes


@pytest.mark.parametrize("n", [0, 1, 7])
def test_a01_shorter_than_a_length(tmp_path: Path, n: int) -> None:
    refused(tmp_path / "f", bytes(n), f"{n} bytes", "at least 8")


def test_a01_every_truncation(tmp_path: Path) -> None:
    whole = blob({"a": entry([4], 0, 16)})
    for n in range(8, len(whole)):
        refused(tmp_path / "f", whole[:n], "truncated", "expected")


@pytest.mark.parametrize("n", [2**63, 2**64 - 1, 100_000_001])
def test_a02_absurd_header_length_allocates_nothing(tmp_path: Path, n: int) -> None:
    tracemalloc.start()
    try:
        refused(tmp_path / "f", n.to_bytes(8, "little") + b"{}" + bytes(1000), str(n), "100000000")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a02_header_longer_than_the_file(tmp_path: Path) -> None:
    refused(tmp_path / "f", (1000).to_bytes(8, "little") + b"{}", "truncated", "10 bytes", "1008")


# ---- A3: header text


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b'{"\xff": 1}', "UTF-8"),
        (b"{nonsense}", "JSON"),
        (b"[1, 2]", "object"),
        (b" {}", "object"),
        (b"", "object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"a": "\\u12"}', "JSON"),
        (b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,16]}, "a": 1}', "twice"),
        (b'{"a": {"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "twice"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
        (b'{"__metadata__": []}', "__metadata__"),
    ],
)
def test_a03_header_text(tmp_path: Path, header: bytes, word: str) -> None:
    refused(tmp_path / "f", blob(header), word)


def test_a03_no_tensors(tmp_path: Path) -> None:
    refused(tmp_path / "f", blob({}, 0), "no tensors")


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a03_deep_nesting_even_without_a_recursion_limit(tmp_path: Path, opening: bytes) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        refused(tmp_path / "f", blob(b'{"x":' + opening * 100_000), "nested 10000")
    finally:
        sys.setrecursionlimit(limit)


# ---- A4, A5, A10: entries


@pytest.mark.parametrize(
    ("header", "n_data", "words"),
    [
        ({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, 24, ("overlaps", "'b'")),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, ("overlaps",)),
        ({"a": entry([4], 16, 0)}, 16, ("span -16",)),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, ("gap", "12", "8")),
        ({"a": entry([2], 8, 16)}, 16, ("gap",)),
        ({"a": entry([4], 0, 16)}, 17, ("1 bytes after the last tensor",)),
        ({"a": entry([5], 0, 20)}, 16, ("truncated", "16", "20")),
        ({"a": entry([4], 0, 12)}, 12, ("span 12", "16")),
        ({"a": entry([4], -4, 12)}, 16, ("data_offsets",)),
        ({"a": entry([4], 0.0, 16)}, 16, ("data_offsets",)),
        ({"a": entry([4], False, 16)}, 16, ("data_offsets",)),
        ({"a": entry([4], 0, 10**4000)}, 16, ("data_offsets", "2^63")),
        ({"a": {**entry([4], 0, 16), "data_offsets": [0, 16, 16]}}, 16, ("data_offsets",)),
        ({"a": entry([2**62, 8], 0, 16)}, 16, ("2^63",)),
        ({"a": entry([2**32, 2**32], 0, 0)}, 0, ("2^63",)),
        ({"a": entry([0], 0, 0)}, 0, ("shape",)),
        ({"a": entry([-2, -2], 0, 16)}, 16, ("shape",)),
        ({"a": entry([4.0], 0, 16)}, 16, ("shape",)),
        ({"a": entry([True, 4], 0, 16)}, 16, ("shape",)),
        ({"a": entry([1] * 8 + [4], 0, 16)}, 16, ("at most 8",)),
        ({"a": entry([2], 0, 16, "F64")}, 16, ("'F64'", "F32", "BF16")),
        ({"a": entry([16], 0, 16, "I8")}, 16, ("'I8'",)),
        ({"a": entry([16], 0, 16, "F8_E4M3")}, 16, ("'F8_E4M3'",)),
        ({"a": entry([16], 0, 16, ["F32"])}, 16, ("dtype",)),
        ({"a": {"dtype": "F32", "shape": [4]}}, 16, ("data_offsets",)),
        ({"a": {**entry([4], 0, 16), "more": 1}}, 16, ("exactly",)),
        ({"a": 7}, 16, ("exactly",)),
        ({"n" * 10**6: 7}, 16, ("exactly",)),
    ],
)
def test_a04_a05_a10_entries(tmp_path: Path, header: Any, n_data: int, words: tuple[str, ...]) -> None:
    refused(tmp_path / "f", blob(header, n_data), *words)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>429</body></html>", "HTML page"),
        (b"\n <html>", "HTML page"),
        (b'<?xml version="1.0"?><Error/>', "XML page"),
    ],
)
def test_a06_git_lfs_pointer_or_web_page(tmp_path: Path, content: bytes, word: str) -> None:
    refused(tmp_path / "model.safetensors", content, word)


# ---- A7, A8: folders


def test_a07_missing_shard(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, random_tensors())
    (tmp_path / weight_map["b"]).unlink()
    with pytest.raises(LoadError, match=rf"1 of 2 shards missing: \['{weight_map['b']}'\]"):
        open_tensors(tmp_path)


def test_a07_tensor_in_the_wrong_shard(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, random_tensors())
    write_index(tmp_path, {**weight_map, "a": weight_map["b"]})
    with pytest.raises(LoadError, match=r"differs from model.safetensors.index.json.*'a'"):
        open_tensors(tmp_path)


def test_a07_tensor_not_in_the_index(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, random_tensors())
    del weight_map["a"]
    write_index(tmp_path, weight_map)
    with pytest.raises(LoadError, match="not assigned to it: \\['a'\\]"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "", "sub/x", "C:\\x", "a\0b", "x" * 256])
def test_a07_names_outside_the_folder(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(LoadError, match="outside its folder"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00001.bin", "model.py", "x"])
def test_a07_files_that_are_not_safetensors(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(LoadError, match=rf"names \['{name}'\]; expected safetensors files only"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": None}])
def test_a07_bad_weight_map(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(LoadError, match="weight_map"):
        open_tensors(tmp_path)


def test_a08_link_out_of_the_folder(tmp_path: Path) -> None:
    save_file(random_tensors(), tmp_path / "elsewhere")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match="outside the model folder"):
        open_tensors(folder)


def test_a08_broken_link_and_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(LoadError, match="leads nowhere"):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(LoadError, match="regular file"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_a08_links_into_the_hub_cache(tmp_path: Path, shared: bool) -> None:
    repo = tmp_path / "hub" / "models--o--n"
    folder = repo / "snapshots" / "0123"
    blobs = (repo.parent if shared else repo) / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file(random_tensors(), blobs / "abc")
    (folder / "model.safetensors").symlink_to(blobs / "abc")
    assert_equal_to_library(folder, ["model.safetensors"])


def test_only_weights_that_can_run_code(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(LoadError, match=r"pytorch_model.bin but no model.safetensors.*cannot run code"):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"an adapter, not a model; merge it into its base model first"):
        open_tensors(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(LoadError, match="neither"):
        open_tensors(tmp_path)


# ---- A20: files that change under a load

ROWS = 1000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file with two tensors of many pages."""
    path = tmp_path / "model.safetensors"
    values = {name: np.full((ROWS, 256), i + 1, np.float32) for i, name in enumerate("ab")}
    data = b"".join(v.tobytes() for v in values.values())
    n = len(data) // 2
    header = blob({"a": entry([ROWS, 256], 0, n), "b": entry([ROWS, 256], n, 2 * n)}, 0)
    path.write_bytes(header + data)
    return path


CHILD = """
import os, sys
from pathlib import Path
from flashformer.checkpoint.safetensors import open_safetensors
from flashformer.errors import LoadError
path = Path(sys.argv[1])
tensors = open_safetensors(path)
whole = tensors["a"].data
os.truncate(path, os.path.getsize(path) // 2)
try:
    tensors["b"].data.sum()
except LoadError as error:
    print(error)
assert whole.min() == whole.max() == 1
"""


def test_a20_truncated_while_loading_is_an_error_and_no_sigbus(large: Path) -> None:
    made = subprocess.run([sys.executable, "-c", CHILD, str(large)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made  # -7 is SIGBUS
    assert f"{large}: changed while it was read" in made.stdout


def test_a20_written_to_while_loading(large: Path) -> None:
    tensors = open_safetensors(large)
    before = os.stat(large)
    with large.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # whatever the clock's resolution
    with pytest.raises(LoadError, match="changed while it was read"):
        tensors["a"].rows(0, 1)


def test_a20_replaced_while_loading_goes_on_with_the_file_that_was_opened(large: Path, tmp_path: Path) -> None:
    tensors = open_safetensors(large)
    (tmp_path / "new").write_bytes(bytes(large.stat().st_size))
    os.replace(tmp_path / "new", large)
    assert tensors["b"].data.min() == tensors["b"].data.max() == 2
    large.unlink()
    assert tensors["a"].rows(ROWS - 1, ROWS).tolist() == [[1.0] * 256]


def test_a20_what_was_read_is_the_readers_own(large: Path) -> None:
    tensors = open_safetensors(large)
    held = tensors["a"].data
    os.truncate(large, 0)
    assert held.min() == held.max() == 1


def test_a20_files_are_closed_with_their_tensors(large: Path) -> None:
    gc.collect()  # nobody else's files close in between
    before = len(os.listdir("/proc/self/fd"))
    tensors = open_safetensors(large)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del tensors
    assert len(os.listdir("/proc/self/fd")) == before


# ---- A21: errors of the disk


def test_a21_a_read_error_names_the_file_and_the_bytes(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = open_safetensors(large)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(LoadError, match=rf"{large}: bytes \d+ to \d+ cannot be read: Input/output error"):
        _ = tensors["b"].data


def test_a21_reads_that_come_in_pieces(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, real = open_safetensors(large)["b"].data, os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: real(fd, [into[0][: 1 + len(into[0]) // 3]], at))
    np.testing.assert_array_equal(open_safetensors(large)["b"].data, whole)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a21_a_file_that_cannot_be_opened(folder: Path, name: str, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, as the superuser may open what others may not."""
    real_os, real_io = os.open, Path.open

    def fails(path: object) -> None:
        if Path(str(path)).name == name:
            raise OSError(error, os.strerror(error), str(path))

    def os_open(path: Any, *args: Any, **options: Any) -> int:
        fails(path)
        return real_os(path, *args, **options)

    def path_open(path: Path, *args: Any, **options: Any) -> Any:
        fails(path)
        return real_io(path, *args, **options)

    monkeypatch.setattr(os, "open", os_open)
    monkeypatch.setattr(Path, "open", path_open)
    with pytest.raises(LoadError) as caught:
        read_all(folder)
    for word in (str(folder / name), os.strerror(error)):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a06_any_file_of_a_folder_may_be_a_git_lfs_pointer(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(LoadError, match=rf"{folder / name}: this is a Git LFS pointer.*git lfs pull"):
        read_all(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a08_links_of_any_file_are_followed_in_the_folder_only(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(folder / "inside")
    (folder / name).symlink_to("inside")
    assert open_checkpoint(folder).tokenizer.vocab_size == VOCAB_SIZE
    (folder / "inside").rename(tmp_path / "outside")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(LoadError, match="outside the model folder"):
        _ = open_checkpoint(folder).tokenizer


def test_small_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(11))
    assert read_bytes(tmp_path / "f", 11) == bytes(11)
    with pytest.raises(LoadError, match="larger than 10 bytes"):
        read_bytes(tmp_path / "f", 10)
