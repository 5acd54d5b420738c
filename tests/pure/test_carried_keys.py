"""Keys of published config.json files that change nothing: a model with them is the model without them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from published import BASE, PUBLISHED, published, sizes
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flashformer.model import read_spec

# Keys of published checkpoints that change nothing in transformers: name in PUBLISHED -> (checkpoint, keys).
CARRIED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "gemma-2-27b": [("gemma-2-9b-it", {"sliding_window_size": 4096})],
    "Mistral-7B-v0.1": [("dictalm2.0-instruct", {"document_attention": True}), ("MLX", {"tf_legacy_loss": False})],
    "Qwen2.5-7B-Instruct": [
        ("Qwen2.5-7B-Instruct-1M", {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}}),
        ("saved by Unsloth", {"unsloth_version": "2025.3", "unsloth_fixed": True, "unsloth_optimized": True}),
    ],
    "Llama-2-13b": [
        ("Llama 1, vicuna-7b-v1.5-16k", {"max_sequence_length": 2048}),
        ("Llama-2-13b-hf, first upload", {"pretraining_tp": 2}),
        ("Seed-Coder-8B-Base", {"layer_norm_eps": None, "resid_pdrop": 0.1}),
        ("Nanbeige4.1-3B", {"embd_pdrop": 0.0}),
        ("ALLaM-7B-Instruct-preview", {"internal_version": "7b-alpha-v2.33.0.30"}),
        ("text part of VILA", {"model_max_length": 4096, "tokenizer_padding_side": "right"}),
    ],
}
LLAMA = published(
    "LlamaForCausalLM", sizes(5120, 13824, 40, 40, 40, 32000, 4096), BASE, rope_theta=10000.0, rope_scaling=None
)


@pytest.mark.parametrize(
    ("name", "checkpoint", "carried"),
    [(name, checkpoint, carried) for name, kinds in CARRIED.items() for checkpoint, carried in kinds],
)
def test_keys_that_published_checkpoints_carry_along(name: str, checkpoint: str, carried: dict[str, Any]) -> None:
    """Read as without them, also by the class of transformers."""
    config = PUBLISHED.get(name, LLAMA)
    assert not set(carried) & set(config), checkpoint
    assert read_spec({**config, **carried}) == read_spec(config)


@pytest.mark.parametrize(
    ("scaling", "carried"),
    [
        # DeepSeek-R1-0528-Qwen3-8B, and Yarn-Llama-2-7b-128k
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, {"attn_factor": 0.8782}),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, {"finetuned": True}),
        ({"rope_type": "dynamic", "factor": 2.0}, {"original_max_position_embeddings": 512}),
    ],
)
def test_keys_of_rope_that_transformers_leaves_aside(scaling: dict[str, Any], carried: dict[str, Any]) -> None:
    config = {**PUBLISHED["Qwen3-8B"], "rope_scaling": scaling}
    both = [deepcopy(config), {**config, "rope_scaling": {**scaling, **carried}}]
    plain, carrying = (read_spec(each) for each in both)
    assert plain == carrying
    kind = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    expected = [kind(AutoConfig.for_model(**each), "cpu", seq_len=1) for each in both]
    assert (expected[0][0] == expected[1][0]).all()
    assert expected[0][1] == expected[1][1]
