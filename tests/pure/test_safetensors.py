"""Weight files: what is read equals what the safetensors library reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from weight_files import assert_equal_to_library, blob, entry, random_tensors, write_shards

from flashformer import LoadError
from flashformer.checkpoint.safetensors import open_safetensors
from flashformer.checkpoint.tensor import Tensor
from flashformer.formats import BF16


def test_single_file_equals_library(tmp_path: Path) -> None:
    save_file(random_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal_to_library(tmp_path, ["model.safetensors"])


def test_shards_equal_library(tmp_path: Path) -> None:
    assert_equal_to_library(tmp_path, sorted(set(write_shards(tmp_path, random_tensors()).values())))


def test_tensors_may_come_in_any_order_of_the_header(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(blob({"b": entry([2], 8, 16), "a": entry([2], 0, 8)}))
    assert_equal_to_library(tmp_path, ["model.safetensors"])


def test_brackets_in_names_are_not_nesting(tmp_path: Path) -> None:
    name = '[{"\\' * 100
    (tmp_path / "f").write_bytes(blob({name: entry([4], 0, 16)}))
    assert list(open_safetensors(tmp_path / "f")) == [name]


@pytest.mark.parametrize(("begin", "end"), [(0, 3), (1, 2), (0, 0), (2, 99), (5, 9), (-2, 3)])
def test_rows_are_those_of_the_whole(tmp_path: Path, begin: int, end: int) -> None:
    save_file(random_tensors(), tmp_path / "f")
    for tensor in open_safetensors(tmp_path / "f").values():
        if tensor.shape:
            np.testing.assert_array_equal(tensor.rows(begin, end), tensor.data[begin:end])


def test_a_tensor_in_memory_reads_as_one_in_a_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(12).reshape(4, 3).bfloat16()}, tmp_path / "f")
    stored = open_safetensors(tmp_path / "f")["a"]
    held = Tensor("a", BF16, stored.data)
    assert (stored.shape, stored.n_bytes) == (held.shape, held.n_bytes) == ((4, 3), 24)
    np.testing.assert_array_equal(stored.data, held.data)
    np.testing.assert_array_equal(stored.rows(1, 3), held.rows(1, 3))


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
