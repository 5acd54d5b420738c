"""Rotary positions against transformers' LlamaRotaryEmbedding."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flashformer.model import RopeKind, RopeSpec, read_spec, rope_table, shape_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def their_rope(config: dict[str, Any], n_positions: int) -> np.ndarray[Any, Any]:
    rotary = LlamaRotaryEmbedding(LlamaConfig(**deepcopy(config)))  # it writes into nested objects
    cos, sin = rotary(torch.zeros(1), torch.arange(n_positions)[None])
    half = cos.shape[-1] // 2
    return np.stack([cos[0, :, :half].numpy(), sin[0, :, :half].numpy()], -1)


def rope_error(config: dict[str, Any], n_positions: int) -> float:
    spec = read_spec({**LLAMA, **config})
    ours = rope_table(spec.rope, spec.layers[0].head_dim, n_positions)
    theirs = their_rope({**LLAMA, **config}, n_positions)
    assert ours.shape == theirs.shape == (n_positions, spec.layers[0].head_dim // 2, 2)
    assert ours.dtype == np.float32
    return float(np.abs(ours.astype(np.float64) - theirs).max())


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "smollm2-135m", "mistral-7b-v0.3", "qwen2.5-0.5b"])
def test_rope_table_equals_transformers(name: str) -> None:
    shape = shape_config(name)
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling")
    config = {k: shape[k] for k in (*keys, "max_position_embeddings") if k in shape}
    assert rope_error(config, shape["max_position_embeddings"] // 4 + 3) <= 1e-6


@pytest.mark.parametrize("head_dim", [2, 6, 10, 48, 112, 256])
@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE, {**LLAMA3_ROPE, "factor": 6.5, "low_freq_factor": 1.3}])
def test_rope_table_odd_sizes(head_dim: int, scaling: dict[str, Any] | None) -> None:
    """Where PyTorch rounds a power differently, angles differ in the last bit of up to 513 radians."""
    config = {"head_dim": head_dim, "rope_theta": 12345.6, "rope_scaling": scaling}
    assert rope_error(config, 513) <= 513 * 2.0**-23


def test_rope_spellings_agree() -> None:
    def rope(**keys: Any) -> RopeSpec:
        return read_spec({**LLAMA, **keys}).rope

    new = rope(rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5})
    assert new == RopeSpec(RopeKind.LLAMA3, 5e5, 32.0, 1.0, 4.0, 8192)
    old_name = {("type" if k == "rope_type" else k): v for k, v in LLAMA3_ROPE.items()}
    assert new == rope(rope_theta=5e5, rope_scaling=LLAMA3_ROPE) == rope(rope_theta=5e5, rope_scaling=old_name)
    assert new == rope(rope_scaling={**LLAMA3_ROPE, "rope_theta": 5e5}, rope_parameters={"rope_type": "default"})
    plain = RopeSpec(RopeKind.DEFAULT, 10000.0)
    assert plain == rope() == rope(rope_scaling=None) == rope(rope_scaling={"type": "default"}, rope_theta=1e4)
    for keys in ({"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, {"rope_theta": 77}, {}):
        theirs = LlamaConfig(**deepcopy({**LLAMA, **keys})).rope_parameters
        assert (rope(**keys).kind, rope(**keys).theta) == (theirs["rope_type"], theirs["rope_theta"])
