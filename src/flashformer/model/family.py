"""What a family file declares. The only knowledge of Hugging Face spelling above the file level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .spec import QkNorm, RopeKind

LayerRule = Callable[[Mapping[str, Any], int], bool]  # (values of config keys, layer) -> answer


def always(values: Mapping[str, Any], layer: int) -> bool:
    return True


def never(values: Mapping[str, Any], layer: int) -> bool:
    return False


@dataclass(frozen=True)
class TensorRule:
    """A role, the name of its tensor in checkpoints, and its shape in the words of `tensors.DIMS`.

    Roles with `{i}` exist once per layer. `switch` names the LayerSpec field without which there is no tensor.
    A tensor may hold several roles as ranges of rows: `fused` are the rows of each, and this role is number `part`.
    """

    role: str
    source: str
    shape: tuple[str, ...]
    switch: str | None = None
    fused: tuple[str, ...] = ()
    part: int = 0


@dataclass(frozen=True)
class Power:
    """A factor: the value of a config key, to a power."""

    key: str
    exponent: float = 1.0


@dataclass(frozen=True)
class Family:
    """A family of checkpoints as data: names, and what to make of every key of config.json.

    A key is read (`config.READ_KEYS` and those in `defaults`), accepted at listed values only (`plain`),
    or ignored for a stated reason (`ignored`); any other key is refused by name.
    """

    name: str
    architecture: str  # entry of `architectures`
    model_type: str
    checkpoints: str  # well-known ones, for people
    special: str  # what sets the family apart, for people
    tensors: tuple[TensorRule, ...]
    defaults: Mapping[str, Any]  # keys that are read, with the values that their absence means
    plain: Mapping[str, tuple[Any, ...]]
    ignored: Mapping[str, str]  # key -> reason
    switches: Mapping[str, str | bool]  # bias fields of LayerSpec -> config key, or the value itself
    activation: str = "hidden_act"  # config key
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: QkNorm | None = None
    norm_offset: float = 0.0  # added in float32 to every stored norm weight
    attention_scale: Power = field(default=Power("head_dim", -0.5))
    embed_multiplier: Power | None = None
    residual_multiplier: Power | None = None
    logits_multiplier: Power | None = None
    score_softcap: str | None = None  # config key
    logits_softcap: str | None = None  # config key
    slides: LayerRule = never  # where `layer_types` is absent; `sliding_window` is None here if it is switched off
    rotates: LayerRule = always
    rope_kinds: tuple[RopeKind, ...] = tuple(RopeKind)
