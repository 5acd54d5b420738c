"""Qwen3: each head of q and k has its RMS norm; windows as in Qwen2."""

from ..family import Family
from ..spec import QkNorm
from . import keys, names, qwen2

FAMILY = Family(
    name="Qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    checkpoints="Qwen3 0.6B to 32B (those without experts)",
    special="RMS norm of every head of q and k",
    tensors=(*names.TENSORS, *names.HEAD_NORMS),
    defaults={**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False},
    plain=keys.PLAIN,
    ignored=keys.IGNORED,
    switches=keys.ATTENTION_BIAS,
    qk_norm=QkNorm.HEAD,
    slides=qwen2.slides,
)
