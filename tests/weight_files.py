"""Weight files byte by byte, good and bad, and folders of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
