"""Qwen2 and Qwen2.5 without a sliding window: biases on q, k, v and nowhere else."""

from ..family import Family
from . import common

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    tensors=common.TENSORS,
    ignored_tensors=common.IGNORED_TENSORS,
    switches={"qkv_bias": True, "o_bias": False, "mlp_bias": False},
    defaults={"num_key_value_heads": 32},
    plain={
        **{key: values for key, values in common.PLAIN.items() if key != "sliding_window"},
        "use_mrope": (False, None),
    },
    ignored={
        **common.IGNORED,
        "sliding_window": "unused unless use_sliding_window",
        "max_window_layers": "unused unless use_sliding_window",
    },
)
