"""Mistral: one sliding window in all layers, or none (7B from v0.2 on)."""

from collections.abc import Mapping
from typing import Any

from ..family import Family
from . import keys, names


def slides(values: Mapping[str, Any], layer: int) -> bool:
    return values["sliding_window"] is not None


FAMILY = Family(
    name="Mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    checkpoints="Mistral 7B v0.1 to v0.3, Mistral Nemo, Zephyr 7B",
    special="a sliding window in all layers (v0.1)",
    tensors=names.TENSORS,
    defaults={
        **keys.DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    plain={**keys.PLAIN, **keys.NO_BIAS_KEYS, "use_sliding_window": (None,)},
    ignored={**keys.IGNORED, "document_attention": keys.TRAINING},
    switches=keys.NO_BIAS,
    slides=slides,
)
