"""MODEL -> Model: spec, weights by role, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import PackedFormats, PackedWeights, Tensor, Tokenizer, open_checkpoint
from ..checkpoint.files import naming
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
    `layers.{i}.` + `q k v o gate up down`, with `attn_norm ffn_norm` (pre_norm), `attn_post_norm ffn_post_norm`
    (post_norm), `q_norm k_norm` (qk_norm), `q_bias k_bias v_bias o_bias gate_bias up_bias down_bias` where the spec
    has them; or a file of all of them, packed. `stored_format`: the one that holds the values of all matrices; of
    packed weights that of what is not quantized.
    """

    name: str
    spec: ModelSpec
    stored_format: Format
    weights: Mapping[str, Tensor] | PackedWeights
    tokenizer: Tokenizer | None  # None: token ids only
    generation_config: Mapping[str, Any]
    folder: Path | None = None  # where its files are; None of random weights

    @property
    def max_positions(self) -> int:
        return self.spec.max_positions

    @property
    def packed_formats(self) -> PackedFormats | None:
        """What packed weights are in; None where formats may be chosen."""
        return self.weights.formats if isinstance(self.weights, PackedWeights) else None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Union of the ids in generation_config.json and config.json."""
        return self.spec.eos_ids


def load_model(model: str | Path, *, revision: str | None = None, offline: bool = False) -> Model:
    """`demo`, a folder, a hub id or `shape:NAME` -> Model; weights are opened, not read. Raises LoadError."""
    if isinstance(model, str) and model.startswith(PREFIX):
        return random_model(model, shape_config(model.removeprefix(PREFIX)))
    checkpoint = open_checkpoint(model, revision=revision, offline=offline)
    with naming(checkpoint.path):
        family = read_family(checkpoint.config)
        spec = read_spec(checkpoint.config, checkpoint.generation_config)
    weights: Mapping[str, Tensor] | PackedWeights
    if checkpoint.packed is not None:
        weights = checkpoint.packed
    else:
        tensors = checkpoint.tensors  # of a hub id, downloaded now that the model is known to be supported
        with naming(checkpoint.path):
            weights = bind(family, spec, tensors)
    tokenizer = checkpoint.tokenizer
    with naming(checkpoint.path):
        require_vocabulary(tokenizer, spec)
    return Model(
        name=checkpoint.name,
        spec=as_stored(spec, weights),
        stored_format=stored_format(weights),
        weights=weights,
        tokenizer=tokenizer,
        generation_config=checkpoint.generation_config,
        folder=checkpoint.path,
    )


def require_vocabulary(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """Raises LoadError if the tokenizer has ids that the model has no embeddings for."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise LoadError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model has only "
            f"vocab_size = {spec.vocab_size} embeddings; they must come from the same download"
        )


def as_stored(spec: ModelSpec, weights: Mapping[str, Tensor] | PackedWeights) -> ModelSpec:
    """Tied is what the weights say: a head of its own wins over the config, as in transformers."""
    tied = weights.tied if isinstance(weights, PackedWeights) else "lm_head" not in weights
    return replace(spec, tied=tied)


def stored_format(weights: Mapping[str, Tensor] | PackedWeights) -> Format:
    """The format of the matrices; where they differ F32, which holds the values of all."""
    if isinstance(weights, PackedWeights):
        return weights.formats.weights
    formats = {tensor.format for tensor in weights.values() if len(tensor.shape) == 2}
    return formats.pop() if len(formats) == 1 else F32


def random_model(name: str, config: Mapping[str, Any]) -> Model:
    """A model of the given config.json: norms are ones, all else bf16 and random, the same every time.

    Raises LoadError.
    """
    family, spec = read_family(config), read_spec(config)
    dues = [due for due in expected(family, spec) if not (spec.tied and due.role == "lm_head")]
    windows = RandomWindows(due.shape for due in dues)
    return Model(
        name=name,
        spec=spec,
        stored_format=BF16,
        weights={due.role: (ones if due.is_norm else windows.make)(due.role, due.shape) for due in dues},
        tokenizer=None,
        generation_config={},
    )
