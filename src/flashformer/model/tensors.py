"""Binding: tensors of a checkpoint -> roles of a ModelSpec, every name and shape accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase

import numpy as np

from ..checkpoint import Tensor
from ..checkpoint.files import shown
from ..errors import LoadError
from ..formats import to_f32
from .family import Family, TensorRule
from .spec import LayerSpec, ModelSpec

# Word of a shape expression -> its value, and the config keys that imply it.
DIMS: dict[str, tuple[Callable[[ModelSpec, LayerSpec], int], str]] = {
    "d_model": (lambda spec, layer: spec.d_model, "hidden_size"),
    "vocab_size": (lambda spec, layer: spec.vocab_size, "vocab_size"),
    "q_width": (lambda spec, layer: layer.q_width, "num_attention_heads * head_dim"),
    "kv_width": (lambda spec, layer: layer.kv_width, "num_key_value_heads * head_dim"),
    "d_ff": (lambda spec, layer: layer.d_ff, "intermediate_size"),
}

_COMPARE_ROWS = 4096


def expected(family: Family, spec: ModelSpec) -> Iterator[tuple[str, str, tuple[int, ...], TensorRule]]:
    """(role, source name, shape, rule) of every tensor that the model may have, an untied lm_head included."""
    for rule in family.tensors:
        layers = enumerate(spec.layers) if "{i}" in rule.role else [(0, spec.layers[0])]
        for i, layer in layers:
            if rule.switch is None or getattr(layer, rule.switch):
                shape = tuple(DIMS[word][0](spec, layer) for word in rule.shape)
                yield rule.role.format(i=i), rule.source.format(i=i), shape, rule


def bind(family: Family, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Roles -> tensors; `lm_head` is there if and only if it is not the embedding.

    Under `tie_word_embeddings` this follows transformers: one of the two tensors serves as both, and where both
    are stored with different values they are not tied after all.
    Raises LoadError for missing, unexpected and misshapen tensors.
    """
    weights: dict[str, Tensor] = {}
    missing: dict[str, str] = {}  # role -> source name
    misshapen: list[str] = []
    sources: set[str] = set()
    for role, source, shape, rule in expected(family, spec):
        sources.add(source)
        if source not in tensors:
            missing[role] = source
            continue
        weights[role] = tensors[source]
        if tensors[source].data.shape != shape:
            keys = ", ".join(DIMS[word][1] for word in rule.shape)
            misshapen.append(f"{source}: found {tensors[source].data.shape}, the config implies {shape} = ({keys})")
    extra = [n for n in tensors if n not in sources and not any(fnmatchcase(n, p) for p in family.ignored_tensors)]
    if spec.tied and len(missing.keys() & {"embed", "lm_head"}) == 1:
        weights["embed"] = weights.get("embed") or weights["lm_head"]
        for role in ("embed", "lm_head"):
            missing.pop(role, None)
        weights.pop("lm_head", None)
    problems = [
        *([f"{len(missing)} missing: {_listed(list(missing.values()))}"] if missing else []),
        *([f"{len(extra)} not known: {_listed(extra)}"] if extra else []),
        *([f"{len(misshapen)} of the wrong shape: {_listed(misshapen)}"] if misshapen else []),
    ]
    if problems:
        raise LoadError(
            f"tensors do not fit config.json ({family.architecture}, num_hidden_layers = {spec.n_layers}): "
            f"{'; '.join(problems)}. Config and weights must come from the same download"
        )
    if spec.tied and "lm_head" in weights and same_values(weights["embed"], weights["lm_head"]):
        del weights["lm_head"]
    return weights


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices of one shape hold the same numbers."""
    return all(
        np.array_equal(to_f32(a.data[i : i + _COMPARE_ROWS], a.format), to_f32(b.data[i : i + _COMPARE_ROWS], b.format))
        for i in range(0, len(a.data), _COMPARE_ROWS)
    )


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - 6} more" if len(items) > 6 else ""
    return "; ".join(item if " " in item else shown(item) for item in items[:6]) + more
