"""Binding: tensors of a checkpoint -> roles of a ModelSpec, every name and shape accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import numpy as np

from ..checkpoint import Tensor
from ..checkpoint.files import shown
from ..checkpoint.tensor import Stored
from ..errors import LoadError
from ..formats import F32, to_f32
from .family import Family
from .spec import LayerSpec, ModelSpec

# Word of a shape expression -> its value, and the config keys that imply it.
DIMS: dict[str, tuple[Callable[[ModelSpec, LayerSpec], int], str]] = {
    "d_model": (lambda spec, layer: spec.d_model, "hidden_size"),
    "vocab_size": (lambda spec, layer: spec.vocab_size, "vocab_size"),
    "head_dim": (lambda spec, layer: layer.head_dim, "head_dim"),
    "q_width": (lambda spec, layer: layer.q_width, "num_attention_heads * head_dim"),
    "kv_width": (lambda spec, layer: layer.kv_width, "num_key_value_heads * head_dim"),
    "d_ff": (lambda spec, layer: layer.d_ff, "intermediate_size"),
}

IGNORED = ("*.rotary_emb.inv_freq",)  # shell patterns of tensors that follow from the config

_COMPARE_ROWS = 4096


@dataclass(frozen=True)
class Due:
    """A role, and the tensor that holds it: rows [begin, begin + shape[0]) of `stored_shape`."""

    role: str
    source: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    begin: int
    keys: str  # what of the config implies stored_shape

    @property
    def is_norm(self) -> bool:
        return self.role.endswith("norm")


def expected(family: Family, spec: ModelSpec) -> Iterator[Due]:
    """Every role that the model may have, an untied lm_head included."""
    for rule in family.tensors:
        layers = enumerate(spec.layers) if "{i}" in rule.role else [(0, spec.layers[0])]
        for i, layer in layers:
            if rule.switch is None or getattr(layer, rule.switch):
                first, *others = (DIMS[word][0](spec, layer) for word in rule.shape)
                parts = [DIMS[word][0](spec, layer) for word in rule.fused] or [first]
                rows = " + ".join(DIMS[word][1] for word in rule.fused or rule.shape[:1])
                yield Due(
                    role=rule.role.format(i=i),
                    source=rule.source.format(i=i),
                    shape=(first, *others),
                    stored_shape=(sum(parts), *others),
                    begin=sum(parts[: rule.part]),
                    keys=", ".join([rows, *(DIMS[word][1] for word in rule.shape[1:])]),
                )


def bind(family: Family, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Roles -> tensors; `lm_head` is there if and only if it is not the embedding.

    A role that is a part of a tensor is a view of its rows. Norms that are stored without their offset are read
    and become F32. Under `tie_word_embeddings` this follows transformers: one of the two tensors serves as both,
    and where both are stored with different values they are not tied after all.
    Raises LoadError for missing, unexpected and misshapen tensors.
    """
    weights: dict[str, Tensor] = {}
    missing: dict[str, str] = {}  # role -> source name
    misshapen: dict[str, str] = {}  # source name -> how
    sources: set[str] = set()
    for due in expected(family, spec):
        sources.add(due.source)
        found = tensors.get(due.source)
        if found is None:
            missing[due.role] = due.source
        elif found.shape != due.stored_shape:
            implied = f"the config implies {due.stored_shape} = ({due.keys})"
            misshapen[due.source] = f"{due.source}: found {found.shape}, {implied}"
        else:
            weights[due.role] = found if due.shape == found.shape else _rows(found, due.begin, due.shape)
    extra = [n for n in tensors if n not in sources and not any(fnmatchcase(n, p) for p in IGNORED)]
    if spec.tied and len(missing.keys() & {"embed", "lm_head"}) == 1:
        only = weights.pop("lm_head", None)
        if only is not None:
            weights["embed"] = only
        for role in ("embed", "lm_head"):
            missing.pop(role, None)
    absent = list(dict.fromkeys(missing.values()))
    problems = [
        *([f"{len(absent)} missing: {_listed(absent)}"] if absent else []),
        *([f"{len(extra)} not known: {_listed(extra)}"] if extra else []),
        *([f"{len(misshapen)} of the wrong shape: {_listed(list(misshapen.values()))}"] if misshapen else []),
    ]
    if problems:
        raise LoadError(
            f"tensors do not fit config.json ({family.architecture}, num_hidden_layers = {spec.n_layers}): "
            f"{'; '.join(problems)}. Config and weights must come from the same download"
        )
    if spec.tied and "lm_head" in weights and same_values(weights["embed"], weights["lm_head"]):
        del weights["lm_head"]
    if family.norm_offset:
        norms = [due.role for due in expected(family, spec) if due.is_norm]
        weights |= {role: _offset(weights[role], family.norm_offset) for role in norms}
    return weights


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices of one shape hold the same numbers."""
    return all(
        np.array_equal(to_f32(a.rows(i, i + _COMPARE_ROWS), a.format), to_f32(b.rows(i, i + _COMPARE_ROWS), b.format))
        for i in range(0, a.shape[0], _COMPARE_ROWS)
    )


def _rows(tensor: Tensor, begin: int, shape: tuple[int, ...]) -> Tensor:
    """Rows [begin, begin + shape[0]), not copied."""
    if isinstance(tensor.source, Stored):
        skipped = begin * prod(shape[1:]) * tensor.format.element_bytes
        return replace(tensor, source=replace(tensor.source, offset=tensor.source.offset + skipped, shape=shape))
    return replace(tensor, source=tensor.source[begin : begin + shape[0]])


def _offset(tensor: Tensor, offset: float) -> Tensor:
    data = np.float32(offset) + to_f32(tensor.data, tensor.format)
    data.flags.writeable = False
    return Tensor(tensor.name, F32, data)


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - 6} more" if len(items) > 6 else ""
    return "; ".join(item if " " in item else shown(item) for item in items[:6]) + more
