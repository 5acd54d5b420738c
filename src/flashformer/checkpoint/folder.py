"""A model folder: configuration, tensors from one file or from shards, tokenizer."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import LoadError
from .convert import INDEX, SINGLE, no_weights
from .files import in_hub_cache, member, read_json, shown
from .packed import PackedWeights, find_packed
from .resolve import SMALL_FILES, Place, locate
from .safetensors import open_safetensors
from .tensor import Tensor
from .tokenizer import Tokenizer, load_tokenizer

MAX_NAME = 255  # characters of a file name


@dataclass(frozen=True)
class Checkpoint:
    """`config` and `generation_config` ({} where absent) as their files say."""

    name: str
    place: Place
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.place.folder

    @property
    def at_hand(self) -> bool:
        """Whether the weights can be opened without a download. Raises LoadError."""
        return self.place.snapshot is None or has_tensors(self.path)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Opened, of a hub id downloaded, on first use; every header is checked, no value read. Raises LoadError."""
        if self.place.snapshot is not None:
            self.place.snapshot.fetch((*SMALL_FILES, *_weight_files(self.place)))
        return open_tensors(self.path)

    @cached_property
    def packed(self) -> PackedWeights | None:
        """What a folder has instead of `tensors` if it was made by `flashformer quantize`; never of a hub id.

        Raises LoadError.
        """
        return None if self.place.snapshot is not None else find_packed(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read on first use. Raises LoadError."""
        return load_tokenizer(self.path)


def open_checkpoint(model: str | Path, *, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """`demo`, a folder or a hub id -> Checkpoint, without its weights yet. Raises LoadError."""
    place = locate(model, revision=revision, offline=offline)
    folder = place.folder
    config_path = member(folder, "config.json")
    if config_path is None:
        raise LoadError(f"{folder}: config.json is missing; expected a Hugging Face model folder")
    generation_path = member(folder, "generation_config.json")
    return Checkpoint(
        name=str(model),
        place=place,
        config=read_json(config_path),
        generation_config=read_json(generation_path) if generation_path else {},
    )


def small_files(folder: Path) -> dict[str, Path]:
    """Name -> path of every file of a model folder that is read, but for the weights. Raises LoadError."""
    names = {path.relative_to(folder).as_posix() for pattern in SMALL_FILES for path in folder.glob(pattern)}
    found = {name: member(folder, name) for name in sorted(names - {INDEX})}
    return {name: path for name, path in found.items() if path is not None}


def has_tensors(folder: Path) -> bool:
    """Whether weights are at hand. In the hub cache, where they may not be downloaded yet: all of them."""
    if member(folder, SINGLE) is not None:
        return True
    index = member(folder, INDEX)
    if index is None:
        return False
    names = set(_weight_map(index).values())
    return not in_hub_cache(folder) or all(member(folder, name) is not None for name in names)


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """model.safetensors, or the shards that model.safetensors.index.json names. Raises LoadError."""
    single = member(folder, SINGLE)
    if single is not None:
        return open_safetensors(single)
    index = member(folder, INDEX)
    if index is not None:
        return _open_shards(folder, index)
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as e:
        raise LoadError(f"{folder}: cannot be read: {e.strerror}; check its permissions") from e
    raise LoadError(no_weights(str(folder), names, str(folder), str(folder)))


def _weight_files(place: Place) -> list[str]:
    """Shell patterns of the files with the weights: SINGLE where the repository has it, else the shards."""
    index = member(place.folder, INDEX)
    if index is None or (place.snapshot is not None and SINGLE in place.snapshot.sizes):
        return [SINGLE]
    return [SINGLE, *(glob.escape(name) for name in sorted(set(_weight_map(index).values())))]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of the file that holds it, plain names only. Raises LoadError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise LoadError(f"{index}: weight_map: expected an object of tensor name -> file, found {shown(weight_map)}")
    names = sorted(set(weight_map.values()))
    outside = [n for n in names if not _is_plain(n)]
    if outside:
        raise LoadError(f"{index}: names files outside its folder: {shown(outside)}; expected plain file names")
    others = [n for n in names if not n.endswith(".safetensors")]
    if others:
        raise LoadError(f"{index}: names {shown(others)}; expected safetensors files only, as they cannot run code")
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether a name can only mean a file in its folder, on any system."""
    return name not in ("", ".", "..") and len(name) <= MAX_NAME and not set(name) & set("/\\:\0")


def _open_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
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
