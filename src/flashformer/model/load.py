"""MODEL -> Model: spec, weights by role, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import Tensor, Tokenizer, open_checkpoint
from ..errors import LoadError
from ..formats import BF16, F32, Format
from .config import read_family, read_spec
from .random import PREFIX, RandomWindows, ones, shape_config
from .spec import ModelSpec
from .tensors import bind, expected


@dataclass(frozen=True, eq=False)
class Model:
    """A model before any format or machine is chosen.

    `weights`: role -> tensor, matrices (n_out, k); roles are `embed`, `final_norm`, `lm_head` (absent if tied) and
    `layers.{i}.` + `attn_norm q k v o ffn_norm gate up down`, with `q_bias k_bias v_bias o_bias gate_bias up_bias
    down_bias` where the spec has them. `stored_format`: the widest of the matrices' formats.
    """

    name: str
    spec: ModelSpec
    stored_format: Format
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer | None  # None: token ids only
    generation_config: Mapping[str, Any]

    @property
    def max_positions(self) -> int:
        return self.spec.max_positions

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Union of the ids in generation_config.json and config.json."""
        return self.spec.eos_ids


def load_model(model: str | Path, *, revision: str | None = None, offline: bool = False) -> Model:
    """`demo`, a folder, a hub id or `shape:NAME` -> Model; weights are mapped, not read. Raises LoadError."""
    if isinstance(model, str) and model.startswith(PREFIX):
        return random_model(model, shape_config(model.removeprefix(PREFIX)))
    checkpoint = open_checkpoint(model, revision=revision, offline=offline)
    try:
        family = read_family(checkpoint.config)
        spec = read_spec(checkpoint.config, checkpoint.generation_config)
        weights = bind(family, spec, checkpoint.tensors)
    except LoadError as e:
        raise LoadError(f"{checkpoint.path}: {e}") from e
    tokenizer = checkpoint.tokenizer
    if tokenizer.vocab_size > spec.vocab_size:
        raise LoadError(
            f"{checkpoint.path}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model has only "
            f"vocab_size = {spec.vocab_size} embeddings; they must come from the same download"
        )
    return Model(
        name=checkpoint.name,
        spec=as_stored(spec, weights),
        stored_format=stored_format(weights),
        weights=weights,
        tokenizer=tokenizer,
        generation_config=checkpoint.generation_config,
    )


def as_stored(spec: ModelSpec, weights: Mapping[str, Tensor]) -> ModelSpec:
    """Tied is what the tensors say: a head of its own wins over the config, as in transformers."""
    return replace(spec, tied="lm_head" not in weights)


def stored_format(weights: Mapping[str, Tensor]) -> Format:
    """The widest of the matrices' formats."""
    return F32 if any(t.format is F32 and t.data.ndim == 2 for t in weights.values()) else BF16


def random_model(name: str, config: Mapping[str, Any]) -> Model:
    """A model of the given config.json with the same random bf16 weights every time. Raises LoadError."""
    family, spec = read_family(config), read_spec(config)
    due = [(role, shape) for role, _, shape, _ in expected(family, spec) if not (spec.tied and role == "lm_head")]
    windows = RandomWindows(shape for _, shape in due)
    return Model(
        name=name,
        spec=spec,
        stored_format=BF16,
        weights={r: ones(r, s) if r.endswith("norm") else windows.make(r, s) for r, s in due},
        tokenizer=None,
        generation_config={},
    )
