"""A model folder: configuration, mapped tensors from one file or from shards, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import LoadError
from .files import member, read_json, shown
from .resolve import resolve
from .safetensors import Tensor, open_safetensors
from .tokenizer import Tokenizer, load_tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_UNSAFE = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.gguf")


@dataclass(frozen=True)
class Checkpoint:
    """`config` and `generation_config` ({} where absent) as their files say; `tensors` mapped, not read."""

    name: str
    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, Tensor]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read on first use. Raises LoadError."""
        return load_tokenizer(self.path)


def open_checkpoint(model: str | Path, *, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """`demo`, a folder or a hub id -> Checkpoint, every header checked. Raises LoadError."""
    folder = resolve(model, revision=revision, offline=offline)
    config_path = member(folder, "config.json")
    if config_path is None:
        raise LoadError(f"{folder}: config.json is missing; expected a Hugging Face model folder")
    generation_path = member(folder, "generation_config.json")
    return Checkpoint(
        name=str(model),
        path=folder,
        config=read_json(config_path),
        generation_config=read_json(generation_path) if generation_path else {},
        tensors=open_tensors(folder),
    )


def has_tensors(folder: Path) -> bool:
    return any(member(folder, name) is not None for name in (SINGLE, INDEX))


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """model.safetensors, or the shards that model.safetensors.index.json names. Raises LoadError."""
    single = member(folder, SINGLE)
    if single is not None:
        return open_safetensors(single)
    index = member(folder, INDEX)
    if index is not None:
        return _open_shards(folder, index)
    unsafe = [name for name in _UNSAFE if member(folder, name)]
    if unsafe:
        raise LoadError(
            f"{folder}: holds {', '.join(unsafe)} but no {SINGLE}; only safetensors are read, as they cannot run code. "
            "Convert it once with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    raise LoadError(f"{folder}: neither {SINGLE} nor {INDEX} is there; expected a Hugging Face model folder")


def _open_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise LoadError(f"{index}: weight_map: expected an object of tensor name -> file, found {shown(weight_map)}")
    names = sorted(set(weight_map.values()))
    outside = [n for n in names if "/" in n or "\\" in n or "\0" in n or n in ("", ".", "..") or ":" in n]
    if outside:
        raise LoadError(f"{index}: names files outside its folder: {shown(outside)}; expected plain file names")
    paths = {n: member(folder, n) for n in names}
    missing = [n for n, path in paths.items() if path is None]
    if missing:
        raise LoadError(f"{folder}: {len(missing)} of {len(names)} shards missing: {shown(missing)}; download them")
    tensors: dict[str, Tensor] = {}
    for name, path in paths.items():
        assert path is not None
        found = open_safetensors(path)
        due = {tensor for tensor, file in weight_map.items() if file == name}
        if set(found) != due:
            raise LoadError(
                f"{path}: differs from {INDEX}: {_listed('not in the shard', due - set(found))}"
                f"{_listed('in the shard but not assigned to it', set(found) - due)}; download both again"
            )
        tensors |= found
    return tensors


def _listed(what: str, names: set[str]) -> str:
    return f" {what}: {shown(sorted(names))}" if names else ""
