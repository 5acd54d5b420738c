"""What a family file declares. The only knowledge of Hugging Face spelling above the file level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TensorRule:
    """A role, the name of its tensor in checkpoints, and its shape in the words of `tensors.DIMS`.

    Roles with `{i}` exist once per layer. `switch` names the LayerSpec field without which there is no tensor.
    """

    role: str
    source: str
    shape: tuple[str, ...]
    switch: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of checkpoints as data: names, and what to make of every key of config.json.

    A key is read (`config.READ_KEYS` and those in `switches`), accepted at listed values only (`plain`),
    or ignored for a stated reason (`ignored`); any other key is refused by name.
    """

    architecture: str  # entry of `architectures`
    model_type: str
    tensors: tuple[TensorRule, ...]
    switches: Mapping[str, str | bool]  # bias fields of LayerSpec -> config key, or the value itself
    ignored_tensors: tuple[str, ...] = ()  # shell patterns of tensors that carry no information
    defaults: Mapping[str, Any] = field(default_factory=dict)  # values of absent keys
    plain: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)  # key -> reason
