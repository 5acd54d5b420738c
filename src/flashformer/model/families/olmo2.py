"""OLMo 2: norms behind attention and feed-forward, none before; q and k normalised over their full width."""

from ..family import Family
from ..spec import QkNorm
from . import keys, names

FAMILY = Family(
    name="OLMo 2",
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    checkpoints="OLMo 2 1B to 32B",
    special="norms after instead of before; RMS norm of all heads of q and k together",
    tensors=(
        *names.ENDS,
        *names.MATRICES,
        names.norm("attn_post_norm", "post_attention_layernorm"),
        names.norm("ffn_post_norm", "post_feedforward_layernorm"),
        names.norm("q_norm", "self_attn.q_norm", "q_width"),
        names.norm("k_norm", "self_attn.k_norm", "kv_width"),
    ),
    defaults={
        **keys.DEFAULTS,
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "attention_bias": False,
    },
    plain={**keys.PLAIN, **keys.NO_WINDOW, "mlp_bias": (False, None)},
    ignored=keys.IGNORED,
    switches=keys.ATTENTION_BIAS,
    pre_norm=False,
    post_norm=True,
    qk_norm=QkNorm.WIDTH,
)
