"""MODEL -> what its configuration alone says, for a plan that loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.files import member, read_json, shown
from ..checkpoint.folder import open_tensors
from ..checkpoint.resolve import resolve
from ..errors import LoadError
from ..formats import BF16, F32, Format
from .config import read_spec
from .random import PREFIX, shape_config
from .spec import ModelSpec

_DTYPES = {"bfloat16": BF16, "float32": F32}
CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Outline:
    """`stored_format` is what config.json states; only where it states none are the tensors' headers read."""

    name: str
    spec: ModelSpec
    stored_format: Format


def read_outline(model: str | Path, *, revision: str | None = None, offline: bool = False) -> Outline:
    """`demo`, a folder, a hub id (only its configuration is downloaded) or `shape:NAME`. Raises LoadError."""
    if isinstance(model, str) and model.startswith(PREFIX):
        return Outline(model, read_spec(shape_config(model.removeprefix(PREFIX))), BF16)
    folder = resolve(model, revision=revision, offline=offline, files=CONFIGS)
    config_path, generation_path = (member(folder, name) for name in CONFIGS)
    if config_path is None:
        raise LoadError(f"{folder}: config.json is missing; expected a Hugging Face model folder")
    config = read_json(config_path)
    try:
        spec = read_spec(config, read_json(generation_path) if generation_path else {})
    except LoadError as e:
        raise LoadError(f"{folder}: {e}") from e
    stated = config.get("dtype", config.get("torch_dtype"))
    if stated is None:
        matrices = [t for t in open_tensors(folder).values() if t.data.ndim == 2]
        return Outline(str(model), spec, F32 if any(t.format is F32 for t in matrices) else BF16)
    if stated not in _DTYPES:
        raise LoadError(f"{config_path}: dtype = {shown(stated)}: expected one of {', '.join(_DTYPES)}")
    return Outline(str(model), spec, _DTYPES[stated])
