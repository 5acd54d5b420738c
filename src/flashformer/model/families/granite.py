"""Granite: four multipliers; the one of the logits divides."""

from ..family import Family, Power
from . import keys, names

FAMILY = Family(
    name="Granite",
    architecture="GraniteForCausalLM",
    model_type="granite",
    checkpoints="Granite 3.0 to 3.3, 2B and 8B",
    special="multipliers of embeddings, scores, residuals and logits",
    tensors=names.TENSORS,
    defaults={
        **keys.DEFAULTS,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    plain={**keys.PLAIN, **keys.NO_WINDOW},
    ignored=keys.IGNORED,
    switches=keys.ALL_BIASES,
    embed_multiplier=Power("embedding_multiplier"),
    attention_scale=Power("attention_multiplier"),
    residual_multiplier=Power("residual_multiplier"),
    logits_multiplier=Power("logits_scaling", -1.0),
)
