"""The plain decoder, and what is saved as such."""

from ..family import Family
from . import keys, names

FAMILY = Family(
    name="Llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    checkpoints="Llama 1, 2, 3 to 3.3, SmolLM and SmolLM2, TinyLlama, Yi, DeepSeek-R1-Distill-Llama",
    special="optional biases; rope scaled for long contexts",
    tensors=names.TENSORS,
    defaults={**keys.DEFAULTS, "attention_bias": False, "mlp_bias": False},
    plain={**keys.PLAIN, **keys.NO_WINDOW, "layer_norm_eps": (None,)},
    ignored=keys.IGNORED,
    switches=keys.ALL_BIASES,
)
