"""Gemma 2: norms before and after, stored as weight - 1; soft caps; every other layer slides."""

from collections.abc import Mapping
from typing import Any

from ..family import Family, Power
from . import keys, names

DEFAULTS = {
    **{key: value for key, value in keys.DEFAULTS.items() if key != "hidden_act"},
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
PLAIN = {**keys.PLAIN, "use_bidirectional_attention": (False, None), "mlp_bias": (False, None)}
IGNORED = {
    **keys.IGNORED,
    "hidden_act": "transformers reads hidden_activation instead",
    "sliding_window_size": "transformers reads sliding_window instead",
}


def slides(values: Mapping[str, Any], layer: int) -> bool:
    return layer % 2 == 0


FAMILY = Family(
    name="Gemma 2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    checkpoints="Gemma 2 2B, 9B, 27B",
    special="norms before and after; soft caps on scores and logits; GELU; every other layer slides",
    tensors=(*names.ENDS, *names.MATRICES, *names.SANDWICH_NORMS),
    defaults=DEFAULTS,
    plain=PLAIN,
    ignored=IGNORED,
    switches=keys.ATTENTION_BIAS,
    activation="hidden_activation",
    post_norm=True,
    norm_offset=1.0,
    attention_scale=Power("query_pre_attn_scalar", -0.5),
    embed_multiplier=Power("hidden_size", 0.5),
    score_softcap="attn_logit_softcapping",
    logits_softcap="final_logit_softcapping",
    slides=slides,
)
