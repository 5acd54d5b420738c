"""MODEL -> what its configuration and the headers of its files say, for a plan that loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.files import member, read_json, shown
from ..checkpoint.folder import has_tensors, open_tensors
from ..checkpoint.resolve import resolve
from ..errors import LoadError
from ..formats import BF16, F32, Format
from .config import read_family, read_spec
from .load import as_stored, stored_format
from .random import PREFIX, shape_config
from .spec import ModelSpec
from .tensors import bind

_DTYPES = {"bfloat16": BF16, "float32": F32}
CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Outline:
    """As `load_model` will find it. Where the tensors are not at hand (a hub id), as config.json states it."""

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
        family = read_family(config)
        spec = read_spec(config, read_json(generation_path) if generation_path else {})
        weights = bind(family, spec, open_tensors(folder)) if has_tensors(folder) else None
    except LoadError as e:
        raise LoadError(f"{folder}: {e}") from e
    if weights is not None:
        return Outline(str(model), as_stored(spec, weights), stored_format(weights))
    stated = config.get("dtype", config.get("torch_dtype"))
    if stated not in _DTYPES:
        raise LoadError(f"{config_path}: dtype = {shown(stated)}: expected one of {', '.join(_DTYPES)}")
    return Outline(str(model), spec, _DTYPES[stated])
