"""Llama 1 to 3.2 and what is saved as such (SmolLM2, TinyLlama, ...)."""

from ..family import Family
from . import common

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    tensors=common.TENSORS,
    ignored_tensors=common.IGNORED_TENSORS,
    switches={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults={"num_key_value_heads": None},
    plain=common.PLAIN,
    ignored=common.IGNORED,
)
