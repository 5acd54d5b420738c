"""Gemma 3, text only: Gemma 2 with q and k normalised per head, and another rotation in the layers that slide."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..spec import QkNorm
from . import gemma2, names


def slides(values: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % int(values["sliding_window_pattern"]) != 0


FAMILY = replace(
    gemma2.FAMILY,
    name="Gemma 3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    checkpoints="Gemma 3 270M and 1B (text only)",
    special="as Gemma 2, without soft caps on scores; RMS norm of every head; five of six layers slide, own rope",
    tensors=(*gemma2.FAMILY.tensors, *names.HEAD_NORMS),
    defaults={
        **{key: value for key, value in gemma2.DEFAULTS.items() if key != "attn_logit_softcapping"},
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
    plain={**gemma2.PLAIN, "attn_logit_softcapping": (None,)},  # transformers computes none
    ignored={**gemma2.IGNORED, "_sliding_window_pattern": "transformers reads sliding_window_pattern instead"},
    qk_norm=QkNorm.HEAD,
    score_softcap=None,
    slides=slides,
)
