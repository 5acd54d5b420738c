"""From the files that transformers writes to tokens: every supported architecture, sharded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from folders import byte_tokenizer
from tiny import relative_error

import flashformer as ff

NARROW = {
    "hidden_size": 60,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 400,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-llama3-rope": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 14}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
}


def write(folder: Path, case: str, *, shards: str = "1GB") -> Any:
    """A folder saved by transformers, every parameter random; returns its fp32 model."""
    architecture, changes = CASES[case]
    config = getattr(transformers, f"{architecture}Config")(**{**NARROW, **changes})
    torch.manual_seed(len(case))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name else 0, 0.2 if "norm" in name or name.endswith("bias") else 0.15)
    model.save_pretrained(folder, max_shard_size=shards)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize("case", CASES)
def test_folder_gives_the_tokens_of_transformers(case: str, tmp_path: Path) -> None:
    oracle = write(tmp_path, case)
    ids = np.random.default_rng(1).integers(0, NARROW["vocab_size"], 200).tolist()
    with ff.load(tmp_path, threads=2) as llm, torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
        assert relative_error(llm.logits(ids), expected) <= 2e-4
        made = llm.generate(ids, max_tokens=40, temperature=0.0, ignore_eos=True).token_ids
        again = torch.tensor([ids + made[:-1]])
        greedy = oracle(again).logits[0, len(ids) - 1 :].argmax(-1).tolist()
    assert made == greedy
    assert len(set(made)) > 10


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    write(tmp_path / "one", "llama")
    write(tmp_path / "many", "llama", shards="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    found = []
    for folder in ("one", "many"):
        with ff.load(tmp_path / folder, threads=2) as llm:
            found.append(llm.logits([5, 6, 7]).tobytes())
    assert found[0] == found[1]
