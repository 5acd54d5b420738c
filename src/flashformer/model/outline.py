"""MODEL -> what its configuration and the headers of its files say, for a plan that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import PackedWeights, Tensor
from ..checkpoint.files import member, naming, read_json
from ..checkpoint.folder import has_tensors, open_tensors
from ..checkpoint.packed import find_packed
from ..checkpoint.resolve import locate
from ..errors import LoadError
from ..formats import BF16, Format
from .config import read_family, read_spec
from .load import as_stored, mixed_formats, stated_format, stored_format
from .random import PREFIX, shape_config
from .spec import ModelSpec
from .tensors import bind

CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Outline:
    """As `load_model` will find it. Where the tensors are not at hand (a hub id), as config.json states it."""

    name: str
    spec: ModelSpec
    stored_format: Format
    generation_config: Mapping[str, Any]
    packed: PackedWeights | None = None  # where the weights are such a file
    warnings: tuple[str, ...] = ()


def read_outline(model: str | Path, *, revision: str | None = None, offline: bool = False) -> Outline:
    """`demo`, a folder, a hub id (only its configuration is downloaded) or `shape:NAME`. Raises LoadError."""
    if isinstance(model, str) and model.startswith(PREFIX):
        return Outline(model, read_spec(shape_config(model.removeprefix(PREFIX))), BF16, {})
    place = locate(model, revision=revision, offline=offline, files=CONFIGS)
    folder = place.folder
    config_path, generation_path = (member(folder, name) for name in CONFIGS)
    if config_path is None:
        raise LoadError(f"{folder}: config.json is missing; expected a Hugging Face model folder")
    config = read_json(config_path)
    generation_config = read_json(generation_path) if generation_path else {}
    with naming(folder):
        family, spec = read_family(config), read_spec(config, generation_config)
    packed = find_packed(folder) if place.snapshot is None else None
    tensors = open_tensors(folder) if packed is None and has_tensors(folder) else None
    weights: Mapping[str, Tensor] | PackedWeights | None = packed
    if tensors is not None:
        with naming(folder):
            weights = bind(family, spec, tensors)
    if weights is not None:
        spec, stored, warning = as_stored(spec, weights), stored_format(weights), mixed_formats(weights)
    else:
        with naming(folder):
            stored, warning = stated_format(config)
    return Outline(str(model), spec, stored, generation_config, packed, (warning,) if warning else ())
