"""Mistral without a sliding window (7B from v0.2 on)."""

from ..family import Family
from . import common

FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    tensors=common.TENSORS,
    ignored_tensors=common.IGNORED_TENSORS,
    switches={"qkv_bias": False, "o_bias": False, "mlp_bias": False},
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    plain={**common.PLAIN, "attention_bias": (False, None), "mlp_bias": (False, None)},
    ignored=common.IGNORED,
)
