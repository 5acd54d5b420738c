"""SmolLM3: every fourth layer is not rotated."""

from collections.abc import Mapping
from typing import Any

from ...checkpoint.files import shown
from ...errors import LoadError
from ..family import Family
from . import keys, names


def rotates(values: Mapping[str, Any], layer: int) -> bool:
    """`no_rope_layers` has a 1 for each layer that is rotated, a 0 for the others."""
    marks = values["no_rope_layers"]
    if marks is None:
        return (layer + 1) % int(values["no_rope_layer_interval"]) != 0
    n_layers = values["num_hidden_layers"]
    if not isinstance(marks, list) or len(marks) < n_layers or not all(type(m) is int and m in (0, 1) for m in marks):
        raise LoadError(f"config.json: no_rope_layers = {shown(marks)}: expected 0 or 1 for each of {n_layers} layers")
    return bool(marks[layer])


def slides(values: Mapping[str, Any], layer: int) -> bool:
    return values["sliding_window"] is not None and not rotates(values, layer)


FAMILY = Family(
    name="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    checkpoints="SmolLM3 3B",
    special="every fourth layer without rope",
    tensors=names.TENSORS,
    defaults={
        **keys.DEFAULTS,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 2000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    plain=keys.PLAIN,
    ignored={**keys.IGNORED, "max_window_layers": keys.UNREAD},
    switches=keys.ALL_BIASES,
    slides=slides,
    rotates=rotates,
)
