"""Weight files: what is mapped equals what the safetensors library reads; every damaged file is refused."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flashformer import LoadError
from flashformer.checkpoint.folder import open_tensors
from flashformer.checkpoint.safetensors import open_safetensors
from flashformer.formats import to_f32


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def blob(header: Any, n_data: int = 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(n_data)


def refused(path: Path, content: bytes, *words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(LoadError) as caught:
        open_safetensors(path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(path))


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 3, 4), "scalar": ()}
    return {
        n: torch.randn(s, generator=rng).to(torch.bfloat16 if n == "a" else torch.float32) for n, s in shapes.items()
    }


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_equal_to_library(folder: Path, files: list[str]) -> None:
    found = open_tensors(folder)
    due = {name: t for file in files for name, t in load_file(folder / file).items()}
    assert found.keys() == due.keys()
    for name, tensor in due.items():
        assert found[name].data.shape == tuple(tensor.shape)
        assert not found[name].data.flags.writeable
        np.testing.assert_array_equal(to_f32(found[name].data, found[name].format), tensor.float().numpy())


def test_single_file_equals_library(tmp_path: Path) -> None:
    save_file(random_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal_to_library(tmp_path, ["model.safetensors"])


def test_shards_equal_library(tmp_path: Path) -> None:
    assert_equal_to_library(tmp_path, sorted(set(write_shards(tmp_path, random_tensors()).values())))


def test_tensors_may_come_in_any_order_of_the_header(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(blob({"b": entry([2], 8, 16), "a": entry([2], 0, 8)}))
    assert_equal_to_library(tmp_path, ["model.safetensors"])


# ---- A1, A2: sizes


@pytest.mark.parametrize("n", [0, 1, 7])
def test_a1_shorter_than_a_length(tmp_path: Path, n: int) -> None:
    refused(tmp_path / "f", bytes(n), f"{n} bytes", "at least 8")


def test_a1_every_truncation(tmp_path: Path) -> None:
    whole = blob({"a": entry([4], 0, 16)})
    for n in range(8, len(whole)):
        refused(tmp_path / "f", whole[:n], "truncated", "expected")


@pytest.mark.parametrize("n", [2**63, 2**64 - 1, 100_000_001])
def test_a2_absurd_header_length_allocates_nothing(tmp_path: Path, n: int) -> None:
    tracemalloc.start()
    try:
        refused(tmp_path / "f", n.to_bytes(8, "little") + b"{}" + bytes(1000), str(n), "100000000")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a2_header_longer_than_the_file(tmp_path: Path) -> None:
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
def test_a3_header_text(tmp_path: Path, header: bytes, word: str) -> None:
    refused(tmp_path / "f", blob(header), word)


def test_no_tensors(tmp_path: Path) -> None:
    refused(tmp_path / "f", blob({}, 0), "no tensors")


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a3_deep_nesting_even_without_a_recursion_limit(tmp_path: Path, opening: bytes) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        refused(tmp_path / "f", blob(b'{"x":' + opening * 100_000), "nested 10000")
    finally:
        sys.setrecursionlimit(limit)


def test_brackets_in_names_are_not_nesting(tmp_path: Path) -> None:
    name = '[{"\\' * 100
    (tmp_path / "f").write_bytes(blob({name: entry([4], 0, 16)}))
    assert list(open_safetensors(tmp_path / "f")) == [name]


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
def test_a4_a5_a10_entries(tmp_path: Path, header: Any, n_data: int, words: tuple[str, ...]) -> None:
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
def test_a6_impostors(tmp_path: Path, content: bytes, word: str) -> None:
    refused(tmp_path / "model.safetensors", content, word)


# ---- A7, A8: folders


def test_a7_missing_shard(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, random_tensors())
    (tmp_path / weight_map["b"]).unlink()
    with pytest.raises(LoadError, match=rf"1 of 2 shards missing: \['{weight_map['b']}'\]"):
        open_tensors(tmp_path)


def test_a7_tensor_in_the_wrong_shard(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, random_tensors())
    write_index(tmp_path, {**weight_map, "a": weight_map["b"]})
    with pytest.raises(LoadError, match=r"differs from model.safetensors.index.json.*'a'"):
        open_tensors(tmp_path)


def test_a7_tensor_not_in_the_index(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, random_tensors())
    del weight_map["a"]
    write_index(tmp_path, weight_map)
    with pytest.raises(LoadError, match="not assigned to it: \\['a'\\]"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "", "sub/x", "C:\\x", "a\0b"])
def test_a7_names_outside_the_folder(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(LoadError, match="outside its folder"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": None}])
def test_a7_bad_weight_map(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(LoadError, match="weight_map"):
        open_tensors(tmp_path)


def test_a8_link_out_of_the_folder(tmp_path: Path) -> None:
    save_file(random_tensors(), tmp_path / "elsewhere")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match="outside the model folder"):
        open_tensors(folder)


def test_a8_broken_link_and_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(LoadError, match="leads nowhere"):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(LoadError, match="regular file"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_a8_links_into_the_hub_cache(tmp_path: Path, shared: bool) -> None:
    repo = tmp_path / "hub" / "models--o--n"
    folder = repo / "snapshots" / "0123"
    blobs = (repo.parent if shared else repo) / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file(random_tensors(), blobs / "abc")
    (folder / "model.safetensors").symlink_to(blobs / "abc")
    assert_equal_to_library(folder, ["model.safetensors"])


def test_only_unsafe_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(LoadError, match=r"pytorch_model.bin but no model.safetensors.*cannot run code"):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(LoadError, match="neither"):
        open_tensors(tmp_path)


# ---- fuzz: any bytes either load or raise LoadError

VALID = blob({"a": entry([2], 0, 8), "b": entry([2, 2], 8, 16, "BF16")})


@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=200).map(lambda b: blob(b, 0)),
        st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=4), st.integers(0, 4)).map(
            lambda edit: VALID[: edit[0]] + edit[1] + VALID[edit[0] + edit[2] :]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets"]), inner, max_size=3)
            ),
        ).map(lambda value: blob({"t": value})),
    )
)
def test_fuzz(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(content)
    try:
        tensors = open_safetensors(path)
    except LoadError:
        return
    assert sum(t.data.nbytes for t in tensors.values()) == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert load_file(path).keys() == tensors.keys()
