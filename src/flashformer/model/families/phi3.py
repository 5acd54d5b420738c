"""Phi-3: q, k, v in one tensor, gate and up in another; part of a head may be rotated; longrope."""

from ..family import Family
from ..spec import RopeKind
from . import keys, mistral, names

QKV = ("q_width", "kv_width", "kv_width")
GATE_UP = ("d_ff", "d_ff")

FAMILY = Family(
    name="Phi-3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    checkpoints="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4-mini",
    special="fused tensors; partly rotated heads; longrope; a sliding window in all layers (Phi-3 mini)",
    tensors=(
        *names.ENDS,
        *names.PRE_NORMS,
        *names.linear("q", "self_attn.qkv_proj", "q_width", "d_model", fused=QKV, part=0),
        *names.linear("k", "self_attn.qkv_proj", "kv_width", "d_model", fused=QKV, part=1),
        *names.linear("v", "self_attn.qkv_proj", "kv_width", "d_model", fused=QKV, part=2),
        *names.linear("o", "self_attn.o_proj", "d_model", "q_width"),
        *names.linear("gate", "mlp.gate_up_proj", "d_ff", "d_model", fused=GATE_UP, part=0),
        *names.linear("up", "mlp.gate_up_proj", "d_ff", "d_model", fused=GATE_UP, part=1),
        *names.linear("down", "mlp.down_proj", "d_model", "d_ff"),
    ),
    defaults={
        **keys.DEFAULTS,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
    },
    plain={
        **{key: values for key, values in keys.PLAIN.items() if key != "partial_rotary_factor"},
        **keys.NO_BIAS_KEYS,
        "use_sliding_window": (None,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
    },
    ignored=keys.IGNORED,
    switches=keys.NO_BIAS,
    slides=mistral.slides,
    rope_kinds=(RopeKind.DEFAULT, RopeKind.LONGROPE),
)
