"""Qwen2 and Qwen2.5: biases on q, k, v and nowhere else; upper layers may slide."""

from collections.abc import Mapping
from typing import Any

from ..family import Family
from . import keys, names

DEFAULTS = {
    **keys.DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def slides(values: Mapping[str, Any], layer: int) -> bool:
    return values["sliding_window"] is not None and layer >= int(values["max_window_layers"])


FAMILY = Family(
    name="Qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    checkpoints="Qwen2, Qwen2.5, Qwen2.5-Coder, QwQ 32B, DeepSeek-R1-Distill-Qwen",
    special="biases on q, k, v; sliding windows where the config switches them on",
    tensors=names.TENSORS,
    defaults=DEFAULTS,
    plain={**keys.PLAIN, "use_mrope": (False, None)},
    ignored={**keys.IGNORED, "dual_chunk_attention_config": keys.UNREAD},
    switches={**keys.NO_BIAS, "qkv_bias": True},
    slides=slides,
)
